"""How a symmetry is written down by hand, and how one that was found is compared with it."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.align import Symmetry
from isthmus.align.terms import Fixed, Product, Sum, Units


@dataclass(frozen=True)
class Architecture:
    """A network, inputs for it, and its symmetry.

    Attributes:
        make: Builds the network.
        inputs: Draws example inputs.
        groups: By a label: size, kind (several that are equally right joined by "|"), and the labels of the groups
            that it lies within. Groups of one unit are none.
        layout: For parameters, the axes: "heads*qk + heads*vo, stream" is a product followed by another, and then the
            stream. Numbers are positions that stay.
        tolerance: Relative change of outputs that counts as none; larger where the network computes in float32 inside,
            whatever the type of its weights.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Any]
    groups: dict[str, tuple[int | str, ...]]
    layout: dict[str, str]
    tolerance: float = 1e-10

    def model(self, seed: int = 0) -> nn.Module:
        """Build in evaluation mode and double precision, with distinct normal weights, biases and statistics."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make().double().eval()
        generator = torch.Generator().manual_seed(seed + 1)

        def draw(tensor: Tensor) -> Tensor:
            return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

        saved = set(model.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                fan = parameter[0].numel() if parameter.ndim > 1 else 4
                parameter.copy_(draw(parameter) / max(fan, 1) ** 0.5 + (0.5 if parameter.ndim == 1 else 0))
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point() and name in saved:
                    buffer.copy_(draw(buffer).abs() + 0.5 if name.endswith("var") else 0.3 * draw(buffer))
        return model

    def data(self, seed: int = 0) -> Any:
        """Draw inputs, in double precision."""
        return self.inputs(torch.Generator().manual_seed(seed))


def vectors(*shape: int) -> Callable[[torch.Generator], Tensor]:
    """Draw normal inputs of a shape."""
    return lambda generator: torch.randn(shape, generator=generator, dtype=torch.float64)


def words(*shape: int, vocabulary: int = 17) -> Callable[[torch.Generator], Tensor]:
    """Draw indices of words."""
    return lambda generator: torch.randint(vocabulary, shape, generator=generator)


def multiset(found: Symmetry, expected: Architecture | None = None) -> Counter[tuple[int, str, int]]:
    """Count the groups by size, kind and number of groups around them.

    Args:
        found: A symmetry.
        expected: None counts the groups of `found`; else what they are expected to be, where it leaves a choice of the
            kind as it was found.
    """
    counted = Counter((group.size, group.kind, len(group.within)) for group in found.groups)
    if expected is None:
        return counted
    wanted: Counter[tuple[int, str, int]] = Counter()
    for size, kinds, *within in expected.groups.values():
        choices = [(int(size), kind, len(within)) for kind in str(kinds).split("|")]
        wanted[max(choices, key=lambda choice: counted[choice] - wanted[choice])] += 1
    return wanted


def matched(found: Symmetry, expected: Architecture) -> list[str]:
    """Compare layouts, groups and what lies within what, up to the names of the groups.

    Returns:
        What differs, in words; empty if nothing does.
    """
    names: dict[str, str] = {}
    differences = []
    for parameter, axes in expected.layout.items():
        if parameter not in found.layout:
            differences.append(f"{parameter} is no parameter; there are {', '.join(found.layout)}")
            continue
        wanted = [_canonical(_parse(axis.strip(), expected.groups)) for axis in axes.split(",")]
        terms = [_canonical(term) for term in found.layout[parameter]]
        if len(terms) != len(wanted) or not all(_same(w, t, names) for w, t in zip(wanted, terms, strict=True)):
            differences.append(f"{parameter}: {', '.join(map(_text, terms))} where {axes} is right")
    if not differences:
        for label, name in names.items():
            group = found.by_name[name]
            size, kinds, *within = expected.groups[label]
            around = {names.get(other, other) for other in map(str, within)}
            if group.size != size or group.kind not in str(kinds).split("|") or set(group.within) != around:
                differences.append(
                    f"{label} ({name}): {group.size} {group.kind} within {group.within} where {size} {kinds} within "
                    f"{within} is right"
                )
    return differences


def _parse(text: str, groups: dict[str, tuple[int | str, ...]]) -> Any:
    def read(node: ast.expr) -> Any:
        match node:
            case ast.BinOp(left, ast.Mult(), right):
                return Product((read(left), read(right)))
            case ast.BinOp(left, ast.Add(), right):
                return Sum((read(left), read(right)))
            case ast.Name(label):
                return Units(label, int(groups[label][0]))
            case ast.Constant(int(size)):
                return Fixed(size)
            case _:
                raise ValueError(text)

    return read(ast.parse(text, mode="eval").body)


def _canonical(term: Any) -> Any:
    """Rewrite as one sum of products: copies in a row are written out, fixed neighbours joined."""
    summands = _summands(term)
    joined: list[Any] = []
    for summand in summands:
        if joined and isinstance(summand, Fixed) and isinstance(joined[-1], Fixed):
            joined[-1] = Fixed(joined[-1].size + summand.size)
        else:
            joined.append(summand)
    return joined[0] if len(joined) == 1 else Sum(tuple(joined))


def _summands(term: Any) -> list[Any]:
    if isinstance(term, Sum):
        return [summand for part in term.parts for summand in _summands(part)]
    if not isinstance(term, Product):
        return [term]
    factors = list(_factors(term))
    if all(isinstance(factor, Fixed) for factor in factors):
        return [Fixed(term.size)]
    first, rest = factors[0], factors[1:]
    if isinstance(first, Fixed):
        return _summands(Product(tuple(rest))) * first.size
    if isinstance(first, Sum):
        return [summand for part in first.parts for summand in _summands(Product((part, *rest)))]
    return [_product([first, *rest])]


def _factors(term: Any) -> Iterable[Any]:
    if isinstance(term, Product):
        for part in term.parts:
            yield from _factors(part)
    elif term.size != 1:
        yield _canonical(term) if isinstance(term, Sum) else term


def _product(factors: list[Any]) -> Any:
    joined: list[Any] = []
    for factor in factors:
        if joined and isinstance(factor, Fixed) and isinstance(joined[-1], Fixed):
            joined[-1] = Fixed(joined[-1].size * factor.size)
        else:
            joined.append(factor)
    return joined[0] if len(joined) == 1 else Product(tuple(joined))


def _same(wanted: Any, term: Any, names: dict[str, str]) -> bool:
    if isinstance(wanted, Units):
        if not isinstance(term, Units) or wanted.size != term.size:
            return False
        if wanted.group not in names and term.group not in names.values():
            names[wanted.group] = term.group
        return names.get(wanted.group) == term.group
    if isinstance(wanted, Fixed):
        return wanted == term
    return (
        type(wanted) is type(term)
        and len(wanted.parts) == len(term.parts)
        and all(_same(w, t, names) for w, t in zip(wanted.parts, term.parts, strict=True))
    )


def _text(term: Any) -> str:
    match term:
        case Units(group, size):
            return f"[{group}: {size}]"
        case Fixed(size):
            return str(size)
        case Product(parts):
            return "*".join(f"({_text(part)})" if isinstance(part, Sum) else _text(part) for part in parts)
        case _:
            return " + ".join(map(_text, term.parts))
