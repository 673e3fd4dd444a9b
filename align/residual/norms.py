"""Norms over the units of a stream, found by what modules do and not by what they are called."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..precise import Precise
from ..probe import double_by_default
from ..soft import soft_permute
from ..symmetry import Symmetry
from ..terms import Fixed, Term, groups_of
from .orthogonal import random_rotation
from .probing import Bench, State, hooked

_EXACT = 1e-9


@dataclass(frozen=True)
class Norm:
    """A module that normalises over the units of a group: y = (gain + 1 - neutral) · n(x) + bias.

    Attributes:
        module: Its path.
        group: Whose units it normalises over.
        kind: What n commutes with: "rms", every orthogonal matrix; "layer", those that leave the ones vector where
            it is; "scale", every matrix, for there is nothing but the gain; "other", none.
        gain: Name of the gain; "" without one.
        bias: Name of the bias; "" without one.
        neutral: The gain that changes nothing: 1, or 0 where the module adds one.
    """

    module: str
    group: str
    kind: str
    gain: str = ""
    bias: str = ""
    neutral: float = 1.0


def find_norms(symmetry: Symmetry, bench: Bench, seed: int = 0) -> list[Norm]:
    """List every module that ran and whose parameters are vectors over the units of a free group.

    Each is run alone, on noise of the shape of its input: the roles of its parameters and what it commutes with are
    measured.
    """
    modules = dict(bench.probe.module("").named_modules())
    candidates: dict[str, tuple[str, Term]] = {}
    for name, module in modules.items():
        vectors = [(key, p) for key, p in module.named_parameters(name, recurse=False) if isinstance(p, Tensor)]
        whole = not any(True for child in module.children() for _ in child.parameters())
        if vectors and whole and all(p.ndim == 1 and key in symmetry.layout for key, p in vectors):
            terms = {symmetry.layout[key][0] for key, _ in vectors}
            groups = groups_of(terms)
            if len(terms) == 1 and len(groups) == 1:
                group = symmetry.by_name[next(iter(groups))]
                if group.kind == "free" and not group.within:
                    candidates[name] = (group.name, terms.pop())
    shapes: dict[str, torch.Size] = {}

    def note(name: str, _: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        tensor = next((value for value in tree_leaves(inputs) if isinstance(value, Tensor)), None)
        if name in candidates and tensor is not None:
            shapes.setdefault(name, tensor.shape)

    def around(model: nn.Module) -> AbstractContextManager[None]:
        return hooked(model, note)

    bench.probe.watch({key: tensor.clone() for key, tensor in bench.state.items()}, bench.batch, around)
    generator = torch.Generator().manual_seed(seed)
    return [
        _recognised(name, bench.probe.module(name), *candidates[name], shape, symmetry, generator)
        for name, shape in shapes.items()
    ]


def _recognised(
    name: str,
    module: nn.Module,
    group: str,
    term: Term,
    shape: torch.Size,
    symmetry: Symmetry,
    generator: torch.Generator,
) -> Norm:
    axes = [axis for axis in reversed(range(len(shape))) if shape[axis] == term.size]
    for axis in axes:
        trial = _Trial(module, axis, term, group, symmetry, generator)
        try:
            found = trial.measure(torch.randn(shape, generator=generator, dtype=torch.float64))
        except Exception:  # it takes more than one tensor, or another kind of it
            continue
        if found is not None:
            kind, gain, bias, neutral = found
            prefix = f"{name}." if name else ""
            return Norm(name, group, kind, gain and prefix + gain, bias and prefix + bias, neutral)
    return Norm(name, group, "other")


@dataclass
class _Trial:
    """A module that runs alone, on its input's axis of units."""

    module: nn.Module
    axis: int
    term: Term
    group: str
    symmetry: Symmetry
    generator: torch.Generator

    def measure(self, x: Tensor) -> tuple[str, str, str, float] | None:
        """Find the kind, the gain, the bias and the neutral gain; None where the axis is not that of the units."""
        self.module.eval()
        names = [name for name, _ in self.module.named_parameters(recurse=False)]
        state = {name: self._drawn() for name in names}
        for name, buffer in self.module.named_buffers(recurse=False):
            state[name] = buffer + self._drawn_like(buffer).abs() if buffer.is_floating_point() else buffer
        x = x.to(next(iter(state.values())).device)
        roles = {name: self._role(state, name, x) for name in names}
        gain = [name for name, role in roles.items() if role == "gain"]
        bias = [name for name, role in roles.items() if role == "bias"]
        if len(gain) > 1 or len(bias) > 1 or len(gain) + len(bias) < len(names):
            return None
        plain = {**state, **{name: torch.zeros_like(state[name]) for name in names}}
        neutral = 0.0 if gain and float(self._run(plain, x).abs().max()) > _EXACT else 1.0
        plain |= {name: torch.full_like(state[name], neutral) for name in gain}
        return self._kind(plain, x), gain[0] if gain else "", bias[0] if bias else "", neutral

    def _kind(self, plain: State, x: Tensor) -> str:
        still = self._run(plain, x)
        if _close(self._run(plain, 2 * x), 2 * still):
            commutes = self._commutes(plain, x, still, hold_ones=False)
            return "scale" if commutes else "other"
        for kind in ("rms", "layer"):
            if self._commutes(plain, x, still, hold_ones=kind == "layer"):
                return kind
        return "other"

    def _commutes(self, plain: State, x: Tensor, still: Tensor, hold_ones: bool) -> bool:
        size = self.symmetry.by_name[self.group].size
        matrix = {self.group: random_rotation(size, self.generator, hold_ones=hold_ones)}
        terms: list[Term] = [Fixed(n) for n in x.shape]
        terms[self.axis] = self.term
        turned = [soft_permute(terms, tensor, matrix, self.symmetry.within) for tensor in (x, still)]
        return _close(self._run(plain, turned[0]), turned[1])

    def _role(self, state: State, name: str, x: Tensor) -> str:
        step = self._drawn()
        before = self._run(state, x)
        once, twice = (self._run({**state, name: state[name] + k * step}, x) - before for k in (1, 2))
        shape = [1] * x.ndim
        shape[self.axis] = -1
        if _close(once, step.reshape(shape).expand_as(once)):
            return "bias"
        return "gain" if _close(twice, 2 * once) else ""

    def _run(self, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
        with torch.no_grad(), Precise(), double_by_default():
            return torch.func.functional_call(self.module, dict(state), (x,))

    def _drawn(self) -> Tensor:
        drawn = torch.randn(self.term.size, generator=self.generator, dtype=torch.float64)
        device = next(self.module.parameters()).device
        return drawn.to(device)

    def _drawn_like(self, buffer: Tensor) -> Tensor:
        return torch.randn(buffer.shape, generator=self.generator, dtype=torch.float64).to(buffer.device)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= _EXACT * (1e-3 + float(b.abs().max()))
