"""How a symmetry is written down by hand, and how one that was found is compared with it."""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.align import Symmetry
from isthmus.align.terms import Arranged, Fixed, Product, Sum, Units


@dataclass(frozen=True)
class Architecture:
    """A network, inputs for it, and its symmetry.

    Attributes:
        make: Builds the network.
        inputs: Draws example inputs.
        groups: By a label: size, kind (several that are equally right joined by "|"), and the labels of the groups
            that it lies within. Groups of one unit are none.
        layout: For parameters, the axes: "heads*qk + heads*vo, stream" is a product followed by another, and then the
            stream. Numbers are positions that stay; "at(a + b, 0, 2, 1, 3)" has at its second place position 2 of the
            sum.
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
    for parameter, text in expected.layout.items():
        if parameter not in found.layout:
            differences.append(f"{parameter} is no parameter; there are {', '.join(found.layout)}")
            continue
        wanted, terms = _parse(text, expected.groups), found.layout[parameter]
        if len(terms) != len(wanted) or not all(_same(w, t, names) for w, t in zip(wanted, terms, strict=True)):
            differences.append(f"{parameter}: {', '.join(map(_text, terms))} where {text} is right")
    if not differences:
        differences += [f"{label} stands nowhere in the layout" for label in expected.groups if label not in names]
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


def _parse(text: str, groups: Mapping[str, tuple[int | str, ...]]) -> list[Any]:
    def read(node: ast.expr) -> Any:
        match node:
            case ast.BinOp(left, ast.Mult(), right):
                return Product((read(left), read(right)))
            case ast.BinOp(left, ast.Add(), right):
                return Sum((read(left), read(right)))
            case ast.Call(ast.Name("at"), [part, *order]):
                return Arranged(read(part), tuple(map(ast.literal_eval, order)))
            case ast.Name(label):
                return Units(label, int(groups[label][0]))
            case ast.Constant(int(size)):
                return Fixed(size)
            case _:
                raise ValueError(text)

    parsed = ast.parse(text, mode="eval").body
    return [read(node) for node in (parsed.elts if isinstance(parsed, ast.Tuple) else [parsed])]


Place = tuple[tuple[tuple[str, int], ...], Any]


def _places(term: Any) -> list[Place]:
    """Tell for every position the units that it stands for, and what it shares with those it may change places with."""
    match term:
        case Units(group, size):
            return [(((group, unit),), ()) for unit in range(size)]
        case Fixed(size):
            return [((), place) for place in range(size)]
        case Sum(parts):
            return [(units, (at, kin)) for at, part in enumerate(parts) for units, kin in _places(part)]
        case Arranged(part, order):
            places = _places(part)
            return [places[position] for position in order]
        case _:
            rows = itertools.product(*map(_places, term.parts))
            return [(tuple(unit for units, _ in row for unit in units), tuple(kin for _, kin in row)) for row in rows]


def _same(wanted: Any, term: Any, names: dict[str, str]) -> bool:
    """Compare position by position; a label takes the first name that it meets."""
    mine, theirs = _places(wanted), _places(term)
    if len(mine) != len(theirs):
        return False
    kin: dict[Any, Any] = {}
    for (labelled, a), (named, b) in zip(mine, theirs, strict=True):
        if len(labelled) != len(named) or kin.setdefault(a, b) != b:
            return False
        for (label, unit), (name, other) in zip(labelled, named, strict=True):
            if label not in names and name not in names.values():
                names[label] = name
            if names.get(label) != name or unit != other:
                return False
    return len(set(kin.values())) == len(kin)


def _text(term: Any) -> str:
    match term:
        case Units(group, size):
            return f"[{group}: {size}]"
        case Fixed(size):
            return str(size)
        case Product(parts):
            return "*".join(f"({_text(part)})" if isinstance(part, Sum) else _text(part) for part in parts)
        case Arranged(part, order):
            return f"at({_text(part)}, {', '.join(map(str, order))})"
        case _:
            return " + ".join(map(_text, term.parts))
