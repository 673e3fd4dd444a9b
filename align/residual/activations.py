"""Rotation of streams by activations: Procrustes on what leaves the norms of two folded networks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ...base.batches import Batch, model_device
from ...base.errors import DataError
from ...base.progress import progress as bar
from ...base.running import evaluating
from ...metrics import Moments, capture
from ..symmetry import Symmetry
from ..terms import Units
from .orthogonal import procrustes
from .streams import Stream


def stream_rotations(
    symmetry: Symmetry,
    streams: Sequence[Stream],
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable[Batch],
    *,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """Find for each stream the rotation that brings the activations of b closest to those of a, in one pass.

    The stream is looked at where it leaves its norms, so that every reader counts alike and the growth of the stream
    along the network does not; where norms have no parameters, at what enters the modules that read it. The
    cross-covariances of all places are added and give the rotation by Procrustes.

    Args:
        symmetry: Of both networks.
        streams: Of both networks.
        model_a: The reference, folded.
        model_b: The second network, folded.
        data: Batches; tokens and positions count as samples.
        progress: Show a bar; None: on a terminal.

    Returns:
        Per stream (units, units) in float64, on the CPU.

    Raises:
        DataError: A stream cannot be seen anywhere.
    """
    places = {stream.name: _places(symmetry, stream) for stream in streams}
    totals = {stream.name: torch.zeros(stream.size, stream.size, dtype=torch.float64) for stream in streams}
    for side in ("output", "input"):
        chosen = {name: modules for name, (at, modules) in places.items() if at == side and modules}
        if chosen:
            moments = _moments(chosen, streams, (model_a, model_b), list(data), side == "input", progress)
            for name in chosen:
                for key in [key for key in moments.names if key.startswith(f"a:{name}:")]:
                    covariance = moments.covariance(key, f"b{key[1:]}")
                    size = moments.variance(key).sum() * moments.variance(f"b{key[1:]}").sum()
                    totals[name] += (covariance / size.sqrt().clamp_min(torch.finfo(torch.float64).tiny)).cpu()
    for name, (_, modules) in places.items():
        if not modules:
            raise DataError(f"stream {name} enters no module of its own, so no activation shows it; use by='weights'")
    return {stream.name: procrustes(totals[stream.name], hold_ones=stream.hold_ones) for stream in streams}


def _places(symmetry: Symmetry, stream: Stream) -> tuple[str, list[str]]:
    whole = Units(stream.name, stream.size)
    norms = [norm.module for norm in stream.norms if symmetry.layout[norm.gain or norm.bias][0] == whole]
    if norms:
        return "output", norms
    points = [point.module for point in symmetry.points if point.side == "input" and point.term == whole]
    return "input", list(dict.fromkeys(points))


def _moments(
    places: dict[str, list[str]],
    streams: Sequence[Stream],
    models: tuple[nn.Module, nn.Module],
    data: Iterable[Batch],
    inputs: bool,
    progress: bool | None,
) -> Moments:
    modules = sorted({module for several in places.values() for module in several})
    sizes = {stream.name: stream.size for stream in streams}
    moments: Moments | None = None
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        captured = [
            stack.enter_context(capture(stack.enter_context(evaluating(model)), modules, inputs=inputs))
            for model in models
        ]
        for batch in bar(data, "matching the stream", show=progress):
            for model in models:
                batch.to(model_device(model)).call(model)
            device = model_device(models[0])
            seen = {
                f"{label}:{name}:{key}": _samples(tensor, sizes[name]).to(device)
                for label, activations in zip("ab", captured, strict=True)
                for name, several in places.items()
                for key, tensor in activations.items()
                if activations.origins[key] in several
            }
            moments = moments or Moments([(key, f"b{key[1:]}") for key in seen if key.startswith("a:")])
            moments.update(seen)
    assert moments is not None, "there is a batch, or reading the data had failed"
    return moments


def _samples(tensor: Tensor, size: int) -> Tensor:
    axis = next(at for at in reversed(range(tensor.ndim)) if tensor.shape[at] == size)
    return tensor.movedim(axis, -1).reshape(-1, size)
