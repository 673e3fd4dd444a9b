"""Accumulators that the processes of `torch.distributed` filled with parts of a data set, joined in every process.

Each process runs its own part of the data, then calls `accumulator.all_reduce()`. A process without any batch takes
part. What differs between the accumulators (layers, unit counts, pairs, kernels) is compared first, in every process
alike: all of them raise the same error, and none is left waiting. Afterwards every process holds the same bits.

Tensors travel on the device that they are on, where the group has a backend for it (gloo for main memory, NCCL for
CUDA); else over a device that the group serves. NCCL needs `torch.cuda.set_device` in each process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..base.errors import DataError, OutputError
from .batch_checks import Pair, check_same
from .minibatch import MinibatchHSIC
from .moments import Moments, _Sums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .gram import Gram


@dataclass(frozen=True)
class _Peers:
    """What each process said of its accumulator, in order of rank."""

    states: Sequence[Mapping[str, Any]]
    rank: int
    lead: int | None  # the first process that has seen a batch; its order of layers is taken
    device: torch.device  # that tensors travel on
    group: ProcessGroup | None

    def sum(self, values: Tensor) -> None:
        """Add up a tensor over all processes, in place."""
        travelling = values.to(self.device).contiguous()
        dist.all_reduce(travelling, group=self.group)
        values.copy_(travelling)

    def gather(self, values: Tensor) -> Tensor:
        """Stack the vectors of all processes."""
        values = values.to(self.device)
        gathered = [torch.empty_like(values) for _ in self.states]
        dist.all_gather(gathered, values, group=self.group)
        return torch.stack(gathered)

    def broadcast(self, values: Tensor, source: int) -> Tensor:
        """Give the values of one process to all; the others pass a tensor of that shape and dtype."""
        travelling = values.to(self.device).contiguous()
        # As bytes, since not every backend knows every dtype.
        dist.broadcast(travelling.view(torch.uint8), self._global(source), group=self.group)
        return travelling

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def check(self, failure: Exception | None) -> None:
        """Raise what failed in this process, or say in which other one something did; none is left waiting."""
        failures: list[Any] = [None] * len(self.states)
        dist.all_gather_object(failures, None if failure is None else str(failure), group=self.group)
        if failure is not None:
            raise failure
        for other, message in enumerate(failures):
            if message is not None:
                raise OutputError(f"process {other} could not keep the samples of all: {message}")

    def each(self, key: str) -> list[Any]:
        """List one entry of all processes."""
        return [state[key] for state in self.states]


def check_met(what: str = "samples") -> None:
    """Refuse to reduce over processes that do not know of each other.

    Args:
        what: What is joined, in the message.

    Raises:
        DataError: `torch.distributed` is not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise DataError(
            f"the processes have not met, so their {what} cannot be joined: call torch.distributed.init_process_group "
            "first and start with torchrun, or join saved files with merge"
        )


def agree(failure: Exception | None, group: ProcessGroup | None = None) -> None:
    """Let all processes go on together, or none: raise what failed in this one, or say in which other one it did.

    Args:
        failure: What stopped this process; None if nothing did.
        group: The processes. Default: all.

    Raises:
        DataError: Another process failed.
    """
    failures: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, None if failure is None else str(failure), group=group)
    if failure is not None:
        raise failure
    for other, message in enumerate(failures):
        if message is not None:
            raise DataError(f"process {other} could not go on: {message}")


def _meet(
    what: str, shared: Mapping[str, Any], state: Mapping[str, Any], device: torch.device | None, group: Any
) -> _Peers:
    """Tell all processes what this one holds, learn theirs, and refuse what does not fit, in all of them.

    Args:
        what: What is joined, in messages.
        shared: What must agree, see `check_same`.
        state: What the others need to know.
        device: Where the tensors of this process are; None before any batch.
        group: The processes; None for all.
    """
    check_met(what)
    rank = dist.get_rank(group)
    if rank < 0:
        raise DataError(f"this process is not in the group whose {what} are joined; call all_reduce in its members")
    mine = {**state, "shared": {"kind": what, **shared}, "device": None if device is None else device.type}
    states: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(states, mine, group=group)
    check_same(what, [state["shared"] for state in states], [f"process {other}" for other in range(len(states))])
    lead = next((other for other, state in enumerate(states) if state["device"] is not None), None)
    served = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
    kind = None if lead is None else states[lead]["device"]
    return _Peers(states, rank, lead, _device(kind if kind in served else served[0], device), group)


def _device(kind: str, own: torch.device | None) -> torch.device:
    if own is not None and own.type == kind:
        return own
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


def all_reduce_moments(moments: Moments, group: ProcessGroup | None = None) -> Moments:
    """Join the moments of all processes, see `Moments.all_reduce`.

    Means are gathered; each process moves its products to the common mean by n δδᵀ (Chan, Golub & LeVeque 1983), and
    these are summed, pair by pair: no two large sums are subtracted.
    """
    names = moments.names
    state = {
        "counts": {name: moments.count(name) for name in names},
        "pairs": moments.pairs,
    }
    device = moments._sums[names[0]].mean.device if names else None
    peers = _meet("moments", moments._shared(), state, device, group)
    if peers.lead is None:
        return moments
    units = peers.states[peers.lead]["shared"]["units"]
    with torch.inference_mode(False), torch.no_grad():
        shift, mean, delta = _common_means(moments, units, peers)
        products = {pair: _product(moments, pair, units, peers.device) for pair in peers.states[peers.lead]["pairs"]}
        for (a, b), product in products.items():
            product.addr_(delta[a].to(product), delta[b].to(product), alpha=state["counts"].get(a, 0))
            peers.sum(product)
        squares = _common_squares(moments, delta, peers)
        home = device or peers.device
        counts = {name: sum(other.get(name, 0) for other in peers.each("counts")) for name in units}
        moments._sums = {name: _Sums(counts[name], shift[name], mean[name], squares[name]).to(home) for name in units}
        moments._products, moments._pairs = products, tuple(products)
    return moments


def _common_means(
    moments: Moments, units: Mapping[str, int], peers: _Peers
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Give the shift of the first process, the mean of all samples relative to it, and how far this one's is off."""
    assert peers.lead is not None
    own = [moments._sums[name] for name in units] if moments._sums else []
    local = [sums.shift for sums in own] + [sums.mean for sums in own]
    width = sum(units.values())
    packed = torch.cat(local) if local else torch.zeros(2 * width, dtype=torch.float64, device=peers.device)
    shifts, means = peers.gather(packed).split(width, dim=1)
    weights = [[float(counts.get(name, 0)) for name in units] for counts in peers.each("counts")]
    sizes = torch.tensor(list(units.values()), device=peers.device)
    weight = torch.tensor(weights, dtype=torch.float64, device=peers.device).repeat_interleave(sizes, dim=1)
    relative = means + (shifts - shifts[peers.lead])
    mean = (weight * relative).sum(0) / weight.sum(0)
    parts = (shifts[peers.lead], mean, relative[peers.rank] - mean)
    # Copies: a view would keep what all processes sent.
    shift, mean, delta = ({name: x.clone() for name, x in _by_name(part, units).items()} for part in parts)
    return shift, mean, delta


def _by_name(packed: Tensor, units: Mapping[str, int]) -> dict[str, Tensor]:
    return dict(zip(units, packed.split(list(units.values())), strict=True))


def _product(moments: Moments, pair: Pair, units: Mapping[str, int], device: torch.device) -> Tensor:
    """Give this process's products of a pair, in the order of the first process."""
    if not moments._sums:
        return torch.zeros(units[pair[0]], units[pair[1]], dtype=torch.float64, device=device)
    return moments._product(*pair).contiguous()


def _common_squares(moments: Moments, delta: Mapping[str, Tensor], peers: _Peers) -> dict[str, Tensor]:
    moved = []
    for name, off in delta.items():
        sums = moments._sums.get(name)
        moved.append(sums.squares.to(off) + sums.count * off**2 if sums else torch.zeros_like(off))
    squares = torch.cat(moved)
    peers.sum(squares)
    split = squares.split([len(part) for part in moved])
    return {name: part.clone() for name, part in zip(delta, split, strict=True)}


def all_reduce_minibatch(hsic: MinibatchHSIC, group: ProcessGroup | None = None) -> MinibatchHSIC:
    """Join the averages of all processes, see `MinibatchHSIC.all_reduce`."""
    state = {"layers": hsic.layers, "counts": hsic._counts}
    device = hsic._own.device if hsic.names and hsic.batches else None
    peers = _meet("HSIC", hsic._shared(), state, device, group)
    if peers.lead is None:
        return hsic
    lead = peers.states[peers.lead]
    with torch.inference_mode(False), torch.no_grad():
        sums = hsic._packed(lead["layers"]).to(device or peers.device)
        peers.sum(sums)
        counts = {key: sum(other[key] for other in peers.each("counts")) for key in lead["counts"]}
        hsic._set(lead["layers"], lead["shared"]["units"], sums, counts)
    return hsic


def all_reduce_gram(gram: Gram, group: ProcessGroup | None = None) -> Gram:
    """Put the samples of all processes one after the other, in order of rank, see `Gram.all_reduce`.

    One block at a time travels; what exceeds `max_bytes` of a process goes to its temporary file. Where that fails in
    one process, all of them raise OutputError and keep what they had.
    """
    own, prints = {name: gram._layer(name) for name in gram.names}, gram.samples
    shared = {
        "units": {name: gram.units(name) for name in own} or None,
        "dtypes": {name: _dtype_name(layer.dtype) for name, layer in own.items()} or None,
        "fingerprints": (prints is not None) if own else None,
    }
    state = {
        "blocks": {name: [(block.count, _dtype_name(block.dtype)) for block in own[name].blocks] for name in own},
        "prints": 0 if prints is None else len(prints),
    }
    device = next(iter(own.values())).shift.device if own else None
    peers = _meet("samples", shared, state, device, group)
    if peers.lead is None:
        return gram
    with torch.inference_mode(False), torch.no_grad():
        whole, failure = _gathered(gram, peers, device or peers.device)
        peers.check(failure)
        if any(peers.each("prints")):
            whole._samples = [_prints(prints, peers)]
    for part in ("dtype", "_layers", "_held", "_spill", "_samples"):
        setattr(gram, part, getattr(whole, part))
    return gram


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _prints(own: Tensor | None, peers: _Peers) -> Tensor:
    parts = []
    for source, count in enumerate(peers.each("prints")):
        part = own if own is not None and source == peers.rank else torch.zeros(count, dtype=torch.int64)
        parts.append(peers.broadcast(part, source).cpu() if count else part)
    return torch.cat(parts)


def _gathered(gram: Gram, peers: _Peers, home: torch.device) -> tuple[Gram, Exception | None]:
    """Collect all rows in a new store. A failure is kept, and what still comes is let pass: the others wait for it."""
    assert peers.lead is not None
    lead = peers.states[peers.lead]["shared"]
    dtype = getattr(torch, next(iter(lead["dtypes"].values())))
    whole, failure = type(gram)(dtype=dtype, max_bytes=gram.max_bytes, folder=gram.folder), None
    for source, state in enumerate(peers.states):
        for name, units in lead["units"].items():
            mine = gram._blocks(name) if source == peers.rank and gram.names else None
            latest = None
            for count, kind in state["blocks"].get(name, ()):
                rows = torch.zeros(count, units, dtype=getattr(torch, kind), device=home)
                shift = torch.zeros(units, dtype=torch.float64, device=home)
                try:
                    rows, shift = (rows, shift) if mine is None else next(mine)
                except Exception as error:
                    failure = failure or error
                received = [peers.broadcast(part, source) for part in (rows, shift)]
                if mine is None:
                    rows, shift = (part.to(home) for part in received)
                # One tensor for the many blocks of one shift.
                latest = latest if latest is not None and torch.equal(latest, shift) else shift
                try:
                    if failure is None:
                        whole._append(name, rows, latest)
                except Exception as error:
                    failure = error
    return whole, failure
