"""The network halfway between two: its loss is what a matching is good for, measured."""

from __future__ import annotations

import torch
from torch import nn

from ...base.batch_norm import batch_norms, reset_batch_norms
from ...base.batches import Data, batches, require_repeatable
from ...base.errors import ArchitectureError
from ...base.evaluation import Evaluation, Measure, evaluate
from ...base.interpolation import segment


def midpoint_loss(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    loss: Measure | None = None,
    metric: Measure | None = None,
    reset: bool | None = None,
    reset_data: Data | None = None,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Measure loss and accuracy of the average of two networks, the point at alpha = 1/2 of the line between them.

    The running statistics of batch norm in an average do not belong to it: its units vary less than those of either
    parent (Jordan et al. 2023). Where there are batch norms, they are therefore measured again before the loss
    is, in one more pass; what is reported is then the loss of a network that has seen this data.

    Args:
        model_a: One network.
        model_b: The other, its units in the order of `model_a`. Neither is changed.
        data: Batches with labels.
        loss: Function (outputs, targets) → mean over the batch; cross entropy by default.
        metric: A second such function; by default accuracy beside the default loss, and none beside another loss.
        reset: Measure the statistics of batch norms again. None: if there are any.
        reset_data: Batches for that; `data` by default.
        device: Where to compute; that of `model_a` by default.

    Returns:
        Loss, metric and number of inputs.

    Raises:
        ArchitectureError: The networks differ in a name or shape; or `reset`, and there is no batch norm.
        DataError: There is no batch, labels are missing or wrong, or the data is needed twice and can be read once.
        NotFiniteError: A parameter or an input holds NaN or infinity.

    >>> a, b = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
    >>> with torch.no_grad():
    ...     _ = a.weight.copy_(torch.tensor([[3.0], [1.0]])), b.weight.copy_(torch.tensor([[1.0], [1.0]]))
    >>> found = midpoint_loss(a, b, (torch.ones(1, 1), torch.tensor([0])))
    >>> round(found.loss, 4), found.metric  # logits 2 and 1
    (0.3133, 1.0)
    """
    normed = bool(batch_norms(model_a))
    if reset and not normed:
        raise ArchitectureError(
            f"reset=True, but {type(model_a).__name__} has no batch norm with running statistics; leave reset=None"
        )
    again = normed if reset is None else reset
    if again and reset_data is None:
        require_repeatable(data, "it is read once to reset batch norm and once to measure the loss")
    middle = segment(model_a, model_b, device).move(0.5)
    if again:
        reset_batch_norms(middle, data if reset_data is None else reset_data, progress=False)
    return evaluate(middle, data, loss=loss, metric=metric)


def can_measure(data: Data, loss: Measure | None = None) -> bool:
    """Tell whether a midpoint loss can be measured on data: it can be read again, and has labels or needs none.

    Args:
        data: Batches; one of them is read, unless it is an iterator, which is left alone.
        loss: Function (outputs, targets); None: cross entropy, which takes integer labels.

    >>> x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    >>> can_measure((x, y)), can_measure(x), can_measure(iter([(x, y)]))
    (True, False, False)
    """
    if hasattr(data, "__next__"):
        return False
    if loss is not None:
        return True
    targets = next(batches(data)).targets
    return targets is not None and not targets.is_floating_point()
