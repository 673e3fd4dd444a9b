import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.base.errors import DataError, NotFiniteError
from isthmus.merge.zipping import Slots, zip_units
from isthmus.merge.zipping.tensors import expansion, merged, unmerged

SEEDS = st.integers(0, 10_000)


def _correlation(seed, networks, units, samples=60):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.corrcoef(rng.normal(size=(networks * units, samples))))


def _partition(slots):
    return {frozenset(np.flatnonzero(slots.index.flatten().numpy() == s).tolist()) for s in range(slots.size)}


def _plain(correlation, networks, within, penalty):
    """The rules once more, as sets and loops: all pairs of slots looked at in every step."""
    total = len(correlation)
    units = total // networks
    value = {frozenset((i, j)): float(correlation[i, j]) for i in range(total) for j in range(i)}
    slots = {i: {i} for i in range(total)}
    budget = [int(within * units * (networks - 1) / networks + 1e-9)] * networks

    def nets(slot):
        return {unit // units for unit in slot}

    pairs = []
    for _ in range(total - units):
        for tier in range(3):
            pairs = [
                (a, b)
                for a, b in itertools.combinations(sorted(slots), 2)
                if (tier > 0 or all(budget[n] > 0 for n in nets(slots[a]) & nets(slots[b])))
                and (tier > 1 or penalty or len(slots[a]) == len(slots[b]) == 1)
            ]
            if pairs:
                break
        a, b = max(pairs, key=lambda pair: value[frozenset(pair)])
        for network in nets(slots[a]) & nets(slots[b]):
            budget[network] -= 1
        for c in slots:
            if c not in (a, b):
                least = min(value[frozenset((a, c))], value[frozenset((b, c))])
                value[frozenset((a, c))] = least * penalty if least > 0 else least
        slots[a] |= slots.pop(b)
    return {frozenset(slot) for slot in slots.values()}


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(2, 3), st.integers(1, 5), st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([0.0, 0.5, 1.0]))
def test_slots_are_those_of_the_rules_followed_naively(seed, networks, units, within, penalty):
    correlation = _correlation(seed, networks, units)
    found = zip_units(correlation, networks, within=within, penalty=penalty)
    assert _partition(found) == _plain(correlation, networks, within, penalty)


@settings(max_examples=10, deadline=None)
@given(SEEDS, st.integers(2, 4), st.integers(1, 6), st.sampled_from([0.0, 0.5, 1.0]))
def test_merging_after_unmerging_changes_nothing(seed, networks, units, penalty):
    slots = zip_units(_correlation(seed, networks, units), networks, penalty=penalty)
    assert slots.merge.shape == (units, networks * units)
    torch.testing.assert_close(slots.merge @ slots.unmerge, torch.eye(units, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(slots.merge.sum(1), torch.ones(units, dtype=torch.float64))
    assert int(slots.counts.sum()) == networks * units


def test_the_highest_correlation_is_merged_first_wherever_it_is():
    correlation = torch.eye(6, dtype=torch.float64)
    for a, b, value in ((0, 1, 0.9), (2, 5, 0.8), (3, 4, 0.7), (0, 3, 0.85)):
        correlation[a, b] = correlation[b, a] = value
    assert _partition(zip_units(correlation, 2)) == {frozenset(s) for s in ((0, 1), (2, 5), (3, 4))}


def test_no_budget_gives_pairs_of_both_networks():
    for seed in range(5):
        slots = zip_units(_correlation(seed, 2, 7), 2, within=0.0)
        assert slots.across == 1.0
        assert sorted(slots.index[1].tolist()) == list(range(7))
        assert slots.index[0].tolist() == list(range(7))


def test_the_budget_bounds_the_merges_within_a_network():
    correlation = torch.zeros(8, 8, dtype=torch.float64)
    for a, b in ((0, 1), (2, 3), (4, 5), (6, 7)):
        correlation[a, b] = correlation[b, a] = 0.9
    assert zip_units(correlation, 2, within=1.0).across == 0.0
    half = zip_units(correlation, 2, within=0.5)
    within = [len({unit // 4 for unit in slot}) == 1 for slot in _partition(half)]
    assert sum(within) == 2


def test_the_penalty_decides_whether_a_third_unit_joins():
    correlation = torch.full((6, 6), 0.1, dtype=torch.float64)
    for a, b in itertools.combinations((0, 1, 3), 2):
        correlation[a, b] = correlation[b, a] = 0.9
    correlation[2, 5] = correlation[5, 2] = 0.3
    assert max(len(slot) for slot in _partition(zip_units(correlation, 2, penalty=0.0))) == 2
    assert frozenset((0, 1, 3)) in _partition(zip_units(correlation, 2, penalty=1.0))


def test_one_network_stays_as_it_is():
    assert zip_units(_correlation(0, 1, 4), 1).index.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("correlation", "options", "message"),
    [
        (torch.eye(5), {}, r"\(5, 5\) for 2 networks"),
        (torch.ones(4, 6), {}, r"\(4, 6\)"),
        (torch.eye(4), {"within": 1.5}, "within is 1.5"),
        (torch.eye(4), {"penalty": -0.1}, "penalty is -0.1"),
    ],
)
def test_what_does_not_fit_is_refused(correlation, options, message):
    with pytest.raises(DataError, match=message):
        zip_units(correlation, 2, **options)


def test_correlations_must_be_finite():
    with pytest.raises(NotFiniteError, match="put 0 where a unit never varies"):
        zip_units(torch.eye(4) / 0, 2)


@pytest.mark.parametrize(
    "index", [torch.tensor([[0, 2]]), torch.tensor([0, 1]), torch.tensor([[0.0]]), torch.zeros(1, 0)]
)
def test_slots_must_be_a_partition(index):
    with pytest.raises(DataError, match="slots of shape"):
        Slots(index if index.dtype == torch.float32 and index.numel() else index.long())


def test_slots_of_averaging():
    slots = Slots.identity(3, 2)
    assert slots.networks == 3
    assert slots.across == 1.0
    torch.testing.assert_close(slots.merge, torch.eye(2, dtype=torch.float64).repeat(1, 3) / 3)


def _dense(slots, network):
    n = slots.size
    return slots.merge[:, network * n : (network + 1) * n], slots.unmerge[network * n : (network + 1) * n]


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_tensors_are_merged_as_the_dense_matrices_say(seed):
    from isthmus.align.terms import Fixed, Product, Units

    g, h = (zip_units(_correlation(seed + at, 2, size), 2) for at, size in ((0, 3), (1, 4)))
    slots = {"g": g, "h": h}
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(3, 8, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    terms = (Units("g", 3), Product((Units("h", 4), Fixed(2))), Fixed(2))
    found = merged(weights, terms, ("writes", "reads", "reads"), slots)
    wanted = torch.stack(
        [
            torch.einsum("ga,ahrk,hb->gbrk", _dense(g, i)[0], w.reshape(3, 4, 2, 2), _dense(h, i)[1])
            for i, w in enumerate(weights)
        ]
    ).sum(0)
    torch.testing.assert_close(found, wanted.reshape(3, 8, 2))
    head = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    read = torch.einsum("ohr,hb->obr", head.reshape(5, 4, 2), _dense(h, 1)[1]).reshape(5, 8)
    torch.testing.assert_close(unmerged(head, (Fixed(5), terms[1]), 1, slots), read)
    values = torch.randn(8, generator=generator, dtype=torch.float64)
    spread = (_dense(h, 1)[1] @ values.reshape(4, 2)).flatten()
    torch.testing.assert_close(values[expansion(terms[1], 1, slots)], spread)


def test_what_has_no_units_is_averaged():
    from isthmus.align.terms import Fixed, Units

    weights = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]])]
    assert merged(weights, (Fixed(1), Fixed(2)), None, {}).tolist() == [[2.0, 4.0]]
    swapped = Slots(torch.tensor([[0, 1], [1, 0]]))
    assert merged(weights, (Fixed(1), Units("g", 2)), ("writes", "reads"), {"g": swapped}).tolist() == [[3.5, 2.5]]
    assert merged([torch.tensor(3), torch.tensor(5)], (), (), {}).item() == 3


def test_two_written_axes_are_averaged_over_what_there_is():
    from isthmus.align.terms import Units

    apart = Slots(torch.tensor([[0, 0], [1, 1]]))
    weights = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.full((2, 2), 8.0)]
    found = merged(weights, (Units("g", 2), Units("h", 2)), ("writes", "writes"), {"g": apart, "h": apart})
    assert found.tolist() == [[2.5, 0.0], [0.0, 8.0]]
