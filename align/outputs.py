"""Which of a network's outputs must stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..base.errors import SymmetryError, nearest

# Parts of the names under which networks hand out what they computed on the way.
_BY_PRODUCTS = (
    "hidden",
    "state",
    "attention",
    "past_key_values",
    "model_output",
    "embeds",
    "mems",
    "cache",
    "router",
    "pooler",
)

Outputs = str | int | Sequence[str | int] | None


def chosen(output: Any, outputs: Outputs = None) -> list[Tensor]:
    """List the tensors of an output that a symmetry must keep.

    Args:
        output: What the network returned: a tensor, or tensors in tuples, lists and mappings.
        outputs: Keys of a mapping, or places in a tuple or list. None takes everything; but of a mapping with logits
            or a loss it leaves out hidden states, attention maps, caches and embeddings, which networks hand out beside
            their results and whose order is free.

    Raises:
        SymmetryError: There is no such output; those that there are are named.

    >>> import torch
    >>> len(chosen({"logits": torch.ones(2), "hidden_states": (torch.ones(3),)}))
    1
    >>> len(chosen((torch.ones(2), torch.ones(3)), outputs=0))
    1
    """
    if outputs is None:
        return _tensors(_results(output) if isinstance(output, Mapping) else output)
    wanted = [outputs] if isinstance(outputs, (str, int)) else list(outputs)
    return [tensor for key in wanted for tensor in _tensors(_entry(output, key))]


def _results(output: Mapping[Any, Any]) -> dict[Any, Any]:
    found = {key: value for key, value in output.items() if not any(word in str(key) for word in _BY_PRODUCTS)}
    named = any(str(key) == "loss" or "logits" in str(key) for key in found)
    return found if named else dict(output)


def _entry(output: Any, key: str | int) -> Any:
    if isinstance(output, Mapping):
        known = list(output)
        if key in output:
            return output[key]
        if isinstance(key, int) and -len(known) <= key < len(known):
            return output[known[key]]
        raise SymmetryError(f"there is no output {key!r}{nearest(str(key), map(str, known))}; there are: {known}")
    if isinstance(output, (tuple, list)):
        if isinstance(key, int) and -len(output) <= key < len(output):
            return output[key]
        raise SymmetryError(f"there is no output {key!r}; the network returns {len(output)}, numbered from 0")
    raise SymmetryError(f"there is no output {key!r}: the network returns a single {type(output).__name__}")


def _tensors(output: Any) -> list[Tensor]:
    """Open mappings that pytree does not know, such as the outputs of transformers."""
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in _tensors(value)]
    if isinstance(output, (tuple, list)):
        return [tensor for value in output for tensor in _tensors(value)]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
