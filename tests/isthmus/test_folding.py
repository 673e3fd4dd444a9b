"""Names folded into patterns, against a plain expansion of these patterns."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.folding import braced, fold


def expand(pattern: str) -> list[str]:
    """Read braces and axes in brackets, as a shell would."""
    choices = []
    for braces, axes, other in re.findall(r"\{([^}]*)\}|\[([^]]*)\]|([^{}\[\]]+)", pattern):
        found = []
        for part in (braces or axes or other).split(","):
            ends = part.split("-")
            if other or len(ends) == 1:
                found.append(part)
            else:
                found += [str(number) for number in range(int(ends[0]), int(ends[1]) + 1)]
        choices.append([f"[{entry}]" for entry in found] if axes else found)
    return ["".join(parts) for parts in itertools.product(*choices)]


WORDS = st.sampled_from(["a", "b", "conv", "conv1", "conv2", "0", "1", "2", "3", "10", "07", "b_1"])
NAMES = st.builds(lambda words, axis: ".".join(words) + axis, st.lists(WORDS, min_size=1, max_size=4),
                  st.sampled_from(["", "[0]", "[1]"]))  # fmt: skip


@settings(deadline=None)
@given(st.lists(NAMES, unique=True, max_size=40))
def test_patterns_mean_these_names_and_no_others(names):
    found = fold(names)
    assert sorted(name for members in found.values() for name in members) == sorted(names)
    for pattern, members in found.items():
        assert sorted(expand(pattern)) == sorted(members)
        assert members == sorted(members, key=names.index)
    assert [members[0] for members in found.values()] == sorted(
        (members[0] for members in found.values()), key=names.index
    )


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.permutations(["weight", "bias", "scale"]))
def test_a_whole_grid_is_one_pattern(blocks, layers, leaves):
    names = [f"stage.{b}.fc{n}.{leaf}[0]" for b in range(blocks) for n in range(layers) for leaf in leaves]
    (pattern,) = fold(names)
    assert sorted(expand(pattern)) == sorted(names)


def test_parts_of_words_stay():
    assert list(fold(["bn1.x", "conv1.x"])) == ["bn1.x", "conv1.x"]
    assert list(fold(["w[0]", "w[1]", "w[2]"])) == ["w[0-2]"]
    assert list(fold([])) == []


@pytest.mark.parametrize(("values", "text"), [([], ""), ([4], "4"), ([3, 1, 2], "1-3"), ([0, 2, 3, 9], "0,2-3,9")])
def test_braced(values, text):
    assert braced(values) == text
