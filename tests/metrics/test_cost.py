from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.base.errors import DataError
from isthmus.metrics.cost import Space, needed, plan


def by_hand(n, units_a, units_b, wide, own):
    """Operations when the layers of `wide` are in sample space, counted one product at a time."""
    units = {**units_a, **units_b}
    total = sum(n * n * units[name] for name in wide)
    total += sum(n * n for a in units_a for b in units_b if a in wide and b in wide)
    total += sum(n * n for _ in wide) if own else 0
    done = set()
    for a in units_a:
        for b in units_b:
            if not (a in wide and b in wide) and frozenset((a, b)) not in done:
                done.add(frozenset((a, b)))
                total += n * units[a] ** 2 if a == b else 2 * n * units[a] * units[b]
    for name in set(units) - set(wide) if own else ():
        if frozenset((name,)) not in done:
            total += n * units[name] ** 2
    return total


layers = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 300), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 2000), units_a=layers, units_b=layers, own=st.booleans())
def test_the_cheapest_threshold_is_taken(n, units_a, units_b, own):
    units_b = {name: units_a.get(name, width) for name, width in units_b.items()}
    units = {**units_a, **units_b}
    best = {}
    for threshold in (*sorted(set(units.values())), None):
        wide = [name for name, width in units.items() if threshold is not None and width >= threshold]
        best[threshold] = by_hand(n, units_a, units_b, wide, own)
    chosen = plan(n, units_a, units_b, own=own)
    assert chosen.thresholds == best
    assert best[chosen.threshold] == min(best.values()) == chosen.flops[chosen.choice]
    wide = [name for name, space in chosen.space.items() if space == "sample"]
    assert by_hand(n, units_a, units_b, wide, own) == min(best.values())
    assert chosen.flops["sample"] == best[min(units.values())]
    assert chosen.flops["feature"] == best[None]
    options: tuple[Space, ...] = ("sample", "feature", "mixed")
    for space in options:
        if space not in chosen.flops:
            continue
        asked = plan(n, units_a, units_b, own=own, space=space)
        assert asked.choice == space
        assert asked.flops[space] >= min(best.values())


@pytest.mark.parametrize("width", [3, 50, 400])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_equal_widths_follow_the_rule_of_thumb(count, width):
    """Feature space wins if and only if n > p (L + 1), as long as kernels are wider than layers are many."""
    units = [{f"{side}{i}": width for i in range(count)} for side in "ab"]
    turn = (2 * width * count * (count + 1)) * width / (2 * count * width + count * count + 2 * count)
    for n in (round(turn * 0.98), round(turn * 1.02) + 1):
        assert plan(n, *units).choice == ("feature" if n > turn else "sample")


def test_wide_layers_go_to_sample_space_and_narrow_ones_do_not():
    chosen = plan(2500, {"narrow": 1}, {"narrow": 1, "wide": 3000})
    assert chosen.choice == "mixed"
    assert chosen.threshold == 3000
    assert chosen.space == {"narrow": "feature", "wide": "sample"}
    assert "wide     3000 sample" in str(chosen)
    assert "mixed" in str(chosen).splitlines()[0]


def test_pairs_are_listed_once():
    for names in combinations("abcd", 3):
        pairs = needed(names, names, own=True)
        assert len(pairs) == 6
        assert len({frozenset(pair) for pair in pairs}) == 6
    assert needed("a", "b", own=False) == [("a", "b")]
    assert set(needed("a", "b", own=True)) == {("a", "b"), ("a", "a"), ("b", "b")}


def test_what_cannot_be_planned():
    with pytest.raises(DataError, match="0 samples"):
        plan(0, {"a": 3}, {"b": 3})
    with pytest.raises(DataError, match="nothing to plan"):
        plan(5, {}, {"b": 3})
    with pytest.raises(DataError, match="space is 'mixed'; all layers have 3 units"):
        plan(5, {"a": 3}, {"b": 3}, space="mixed")
    with pytest.raises(DataError, match="space is 'both'; expected auto, sample, feature"):
        plan(5, {"a": 3}, {"b": 3}, space="both")  # pyright: ignore[reportArgumentType]
