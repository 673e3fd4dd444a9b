from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.align.units.one_to_one import UnitMatching, bipartite_matching, semi_matching, semi_matching_gain
from isthmus.base.errors import CheckpointError, DataError, LayerNotFoundError, NotFiniteError, OutputError
from isthmus.metrics import Moments, mutual_information, unit_correlation

NAN = math.nan
MATCHERS: list[Callable[..., UnitMatching]] = [bipartite_matching, semi_matching]


def matrix(p, q, seed=0, coarse=False):
    values = np.random.default_rng(seed).standard_normal((p, q))
    return np.round(values) if coarse else values


def best_total(values):
    """Every way to give the units of the smaller side different partners."""
    p, q = values.shape
    if p > q:
        return best_total(values.T)
    return max(values[range(p), list(columns)].sum() for columns in permutations(range(q), p))


def best_above(values, minimum):
    """Every way to give each unit one partner or none."""
    best = 0.0
    for choice in product(range(-1, values.shape[1]), repeat=len(values)):
        made = [(row, column) for row, column in enumerate(choice) if column >= 0]
        if len({column for _, column in made}) == len(made):
            best = max(best, sum(values[pair] - minimum for pair in made))
    return best


def moments(**layers):
    found = Moments()
    for start in range(0, len(next(iter(layers.values()))), 50):
        found.update({name: torch.as_tensor(x[start : start + 50]) for name, x in layers.items()})
    return found


def planted(n=400, p=20, q=20, noise=0.5, seed=0):
    """Two layers that see the same sources, in another order, scale and sign of offset, with noise of their own."""
    rng = np.random.default_rng(seed)
    sources = rng.standard_normal((n, max(p, q)))
    order = rng.permutation(max(p, q))
    x = sources[:, :p] + noise * rng.standard_normal((n, p))
    y = sources[:, order][:, :q] * rng.uniform(0.1, 9, q) - 3
    return x, y + noise * y.std(0) * rng.standard_normal((n, q)), order[:q]


shapes = st.tuples(st.integers(1, 5), st.integers(1, 5))


# Bipartite


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**20), coarse=st.booleans())
def test_the_sum_is_largest_among_all_matchings(shape, seed, coarse):
    values = matrix(*shape, seed=seed, coarse=coarse)
    found = bipartite_matching(values)
    assert found.total == pytest.approx(best_total(values), abs=1e-12)
    pairs = found.pairs.numpy()
    assert len(pairs) == min(shape)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    np.testing.assert_array_equal(found.similarity[pairs[:, 0]], values[pairs[:, 0], pairs[:, 1]])


def test_seven_units_each():
    values = matrix(7, 7)
    assert bipartite_matching(values).total == pytest.approx(best_total(values), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 2**20),
    coarse=st.booleans(),
    minimum=st.sampled_from([-1.0, -0.3, 0.0, 0.5, 1.0, 9.0]),
)
def test_with_a_minimum_units_may_be_left_alone(shape, seed, coarse, minimum):
    values = matrix(*shape, seed=seed, coarse=coarse)
    found = bipartite_matching(values, minimum=minimum)
    made = found.similarity[found.partner >= 0].numpy()
    assert (made > minimum).all()
    assert (made - minimum).sum() == pytest.approx(best_above(values, minimum), abs=1e-12)


def test_a_minimum_is_more_than_dropping_pairs_afterwards():
    values = np.array([[0.9, 0.8], [0.7, 0.1]])
    whole, limited = bipartite_matching(values), bipartite_matching(values, minimum=0.75)
    assert whole.partner.tolist() == [1, 0]
    assert whole.similarity.tolist() == [0.8, 0.7]  # of which one is above: 0.05 more than the minimum
    assert limited.partner.tolist() == [0, -1]  # 0.15 more
    assert limited.unmatched_a == limited.unmatched_b == (1,)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), minimum=st.sampled_from([None, 0.2]))
@pytest.mark.parametrize("matcher", MATCHERS)
def test_matchings_follow_the_order_of_the_units(matcher, seed, minimum):
    rng = np.random.default_rng(seed)
    values, rows, columns = matrix(6, 8, seed), rng.permutation(6), rng.permutation(8)
    found = matcher(values, minimum=minimum).matrix().numpy()
    np.testing.assert_array_equal(
        matcher(values[rows][:, columns], minimum=minimum).matrix().numpy(), found[rows][:, columns]
    )


@pytest.mark.parametrize(("p", "q"), [(20, 20), (20, 12), (12, 20)])
def test_a_planted_permutation_is_recovered(p, q):
    x, y, order = planted(p=p, q=q)
    found = bipartite_matching(moments(x=x, y=y), "x", "y")
    expected = {(int(unit), place) for place, unit in enumerate(order) if unit < p}
    # Units without a counterpart take what is left: all pairs that were planted are among those made.
    assert expected <= {(a, b) for a, b in found.pairs.tolist()}
    limited = bipartite_matching(moments(x=x, y=y), "x", "y", minimum=0.4)
    assert {(a, b) for a, b in limited.pairs.tolist()} == expected


def test_moments_give_what_their_correlations_give():
    x, y, _ = planted(p=9, q=14)
    for matcher in MATCHERS:
        read = matcher(moments(x=x, y=y), "x", "y")
        given_ = matcher(unit_correlation(x, y))
        assert torch.equal(read.partner, given_.partner)
        torch.testing.assert_close(read.similarity, given_.similarity)
    back = bipartite_matching(moments(x=x, y=y), "y", "x")
    assert torch.equal(back.partner, bipartite_matching(moments(x=x, y=y), "x", "y").inverse().partner)


def test_a_layer_matches_itself():
    x, _, _ = planted()
    assert bipartite_matching(moments(x=x), "x", "x").partner.tolist() == list(range(20))


def test_any_similarity_will_do():
    x, y, order = planted(noise=0.1)
    found = bipartite_matching(mutual_information(x, np.abs(y + 3), bins=6))  # no linear correlation is left
    assert found.partner[order].tolist() == list(range(20))


# Semi


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**20), coarse=st.booleans(), minimum=st.sampled_from([None, 0.0, 1.0]))
def test_the_best_partner_is_chosen(shape, seed, coarse, minimum):
    values = matrix(*shape, seed=seed, coarse=coarse)
    found = semi_matching(values, minimum=minimum)
    for row, partner, similarity in zip(values, found.partner.tolist(), found.similarity.tolist(), strict=True):
        if minimum is None or max(row) > minimum:
            assert partner == list(row).index(max(row))
            assert similarity == max(row)
        else:
            assert partner == -1
            assert math.isnan(similarity)
    assert set(found.unmatched_b) == set(range(shape[1])) - set(found.partner.tolist())


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**20), minimum=st.sampled_from([None, 0.0]))
def test_the_gain_is_what_the_best_partner_adds(shape, seed, minimum):
    values = matrix(*shape, seed=seed)
    one, semi = bipartite_matching(values, minimum=minimum), semi_matching(values, minimum=minimum)
    gain = semi_matching_gain(one, semi)
    alone = one.partner < 0
    assert gain.isnan().equal(alone)
    expected = [max(row) - row[j] for row, j in zip(values, one.partner.tolist(), strict=True) if j >= 0]
    np.testing.assert_allclose(gain[~alone], expected, atol=1e-15)
    assert bool((gain[~alone] >= 0).all())
    assert bool((gain[~alone] == 0).equal((one.partner == semi.partner)[~alone]))  # no ties in these


def test_gain_of_matchings_that_do_not_belong_together_is_refused():
    values = matrix(4, 4)
    one, semi = bipartite_matching(values), semi_matching(values)
    with pytest.raises(DataError, match="expected a bipartite and a semi-matching; these are semi and bipartite"):
        semi_matching_gain(semi, one)
    with pytest.raises(DataError, match=r"\(4, 4\) and of \(4, 5\)"):
        semi_matching_gain(one, semi_matching(matrix(4, 5)))
    with pytest.raises(DataError, match="gain of unit"):
        semi_matching_gain(one, semi_matching(values - 9))


# Units that do not vary


def test_constant_units_have_no_partner():
    x, y, _ = planted(p=6, q=8)
    x[:, 2] = 0.1
    y[:, [0, 7]] = -1e6
    for matcher in (*MATCHERS, partial(bipartite_matching, minimum=-2)):
        for found in (matcher(moments(x=x, y=y), "x", "y"), matcher(unit_correlation(x, y))):
            assert found.constant_a == (2,)
            assert found.constant_b == (0, 7)
            assert found.shape == (6, 8)
            assert found.partner[2] == -1
            assert found.similarity.isnan().tolist() == [False, False, True, False, False, False]
            assert not {0, 7} & set(found.partner.tolist())
            assert not {2} & set(found.unmatched_a)
            assert not {0, 7} & set(found.unmatched_b)
    kept = bipartite_matching(unit_correlation(np.delete(x, 2, 1), np.delete(y, [0, 7], 1)))
    found = bipartite_matching(moments(x=x, y=y), "x", "y")
    assert found.partner[[0, 1, 3, 4, 5]].tolist() == (kept.partner + 1).tolist()
    assert found.unmatched_b == tuple(unit + 1 for unit in kept.unmatched_b)


# What a matching tells


def example():
    return bipartite_matching([[0.9, NAN, 0.8], [NAN, NAN, NAN], [0.7, NAN, 0.1], [0.2, NAN, 0.3]])


def test_what_a_matching_tells():
    found = example()
    assert found.partner.tolist() == [2, -1, 0, -1]
    assert found.pairs.tolist() == [[0, 2], [2, 0]]
    assert found.mean == pytest.approx(0.75)
    assert found.total == pytest.approx(1.5)
    assert (found.constant_a, found.constant_b) == ((1,), (1,))
    assert (found.unmatched_a, found.unmatched_b) == ((3,), ())
    assert found.matrix().nonzero().tolist() == [[0, 2], [2, 0]]
    assert repr(found) == "UnitMatching(bipartite: 2 of 4 units to 3, mean similarity 0.75)"
    back = found.inverse()
    assert back.partner.tolist() == [2, -1, 0]
    assert back.similarity.nan_to_num(9).tolist() == [0.7, 9, 0.8]
    assert back.shape == (3, 4)
    assert (back.constant_a, back.unmatched_b) == ((1,), (3,))
    assert back.inverse().to_dict() == found.to_dict()
    with pytest.raises(DataError, match="a semi matching has no inverse"):
        semi_matching(matrix(3, 3)).inverse()


def test_a_matching_of_nothing():
    found = bipartite_matching([[0.1, 0.2]], minimum=0.5)
    assert found.pairs.shape == (0, 2)
    assert math.isnan(found.mean)
    assert found.total == 0
    assert math.isnan(found.agreement(found))
    assert found.on([[1.0, 2.0]]).isnan().all()
    assert found.to_dict()["mean"] is None
    assert found.inverse().partner.tolist() == [-1, -1]


def test_similarity_of_the_same_pairs_in_other_data():
    found = example()
    other = np.arange(12.0).reshape(4, 3)
    assert found.on(other).nan_to_num(-1).tolist() == [2, -1, 6, -1]
    other[2] = NAN  # does not vary there
    assert found.on(other).nan_to_num(-1).tolist() == [2, -1, -1, -1]
    other[:, 2] = NAN
    assert found.on(other).isnan().all()
    with pytest.raises(DataError, match=r"\(3, 4\) units, this matching of \(4, 3\)"):
        found.on(matrix(3, 4))


def test_held_out_similarity_is_not_biased():
    rng = np.random.default_rng(0)
    noise = [rng.standard_normal((60, 30)) for _ in range(4)]
    found = semi_matching(moments(x=noise[0], y=noise[1]), "x", "y")
    held_out = found.on(moments(x=noise[2], y=noise[3]), "x", "y")
    assert found.mean > 0.2  # the best of thirty correlations of independent noise
    assert abs(held_out.mean()) < 0.1
    chosen = np.corrcoef(noise[2].T, noise[3].T)[:30, 30:][np.arange(30), found.partner]
    np.testing.assert_allclose(held_out, chosen, atol=1e-12)


def test_agreement_is_a_share_of_the_units_matched_here():
    values = np.array([[0.9, 0.8, 0.1], [0.7, 0.1, 0.2], [0.0, 0.0, 0.6]])
    one, semi, few = bipartite_matching(values), semi_matching(values), bipartite_matching(values, minimum=0.75)
    assert one.partner.tolist() == [1, 0, 2]
    assert few.partner.tolist() == [0, -1, -1]
    assert one.agreement(one) == 1
    assert one.agreement(semi) == semi.agreement(one) == pytest.approx(2 / 3)
    assert few.agreement(semi) == 1
    assert semi.agreement(few) == pytest.approx(1 / 3)
    with pytest.raises(DataError, match=r"\(3, 3\) and of \(2, 3\)"):
        one.agreement(bipartite_matching(values[:2]))


# Files


def test_json():
    found = example()
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["partner"] == [2, -1, 0, -1]
    assert content["similarity"] == [0.8, None, 0.7, None]
    assert content["kind"] == "bipartite"
    assert content["shape"] == [4, 3]
    assert [content[name] for name in ("constant_a", "constant_b", "unmatched_a", "unmatched_b")] == [[1], [1], [3], []]


@pytest.mark.parametrize("matcher", MATCHERS)
def test_a_file_gives_the_matching_back(matcher, tmp_path):
    x, y, _ = planted(p=9, q=7)
    x[:, 3] = 0
    found = matcher(moments(x=x, y=y), "x", "y")
    path = found.save(tmp_path / "matching.safetensors")
    read = UnitMatching.load(path)
    assert read.to_dict() == found.to_dict()
    assert read.shape == found.shape
    assert torch.equal(read.partner, found.partner)
    assert read.save(tmp_path / "again").read_bytes() == path.read_bytes()


def test_other_files_are_refused(tmp_path):
    x, y, _ = planted()
    other = moments(x=x, y=y).save(tmp_path / "moments")
    with pytest.raises(CheckpointError, match="holds no unit matching"):
        UnitMatching.load(other)
    with pytest.raises(CheckpointError, match="missing is not a whole file"):
        UnitMatching.load(tmp_path / "missing")
    whole = example().save(tmp_path / "matching").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-9])
    with pytest.raises(CheckpointError, match="cut is not a whole file"):
        UnitMatching.load(tmp_path / "cut")
    (tmp_path / "changed").write_bytes(whole.replace(b"[4, 3]", b"[5, 3]"))
    with pytest.raises(CheckpointError, match=r"expected \(5,\)"):
        UnitMatching.load(tmp_path / "changed")
    with pytest.raises(OutputError, match="cannot write"):
        example().save(tmp_path / "nowhere" / "matching")


# Wrong use


@pytest.mark.parametrize("matcher", MATCHERS)
def test_wrong_input_is_refused(matcher):
    x, y, _ = planted(p=5, q=4)
    found = moments(x=x, y=y)
    with pytest.raises(DataError, match="minimum is nan"):
        matcher(matrix(2, 2), minimum=NAN)
    with pytest.raises(DataError, match="name two layers"):
        matcher(found)
    with pytest.raises(DataError, match="beside a matrix"):
        matcher(matrix(2, 2), "x", "y")
    with pytest.raises(LayerNotFoundError, match="'z'"):
        matcher(found, "x", "z")
    with pytest.raises(NotFiniteError, match=r"NaN at \(0, 1\)"):
        matcher([[0.1, NAN], [0.2, 0.3]])
    with pytest.raises(NotFiniteError, match="infinity"):
        matcher([[0.1, math.inf], [0.2, 0.3]])
    with pytest.raises(DataError, match="none of the 5 units of a varies"):
        matcher(moments(x=np.ones_like(x), y=y), "x", "y")


def test_parts_that_do_not_fit_are_refused():
    partner, similarity = torch.tensor([1, -1]), torch.tensor([0.5, NAN], dtype=torch.float64)
    UnitMatching("semi", partner, similarity, (2, 2))
    for kind, partners, shape, message in (
        ("greedy", partner, (2, 2), "kind is 'greedy'"),
        ("semi", partner, (3, 2), r"expected \(3,\)"),
        ("semi", partner.to(torch.int32), (2, 2), "int64"),
        ("semi", partner, (2, 1), "outside -1 … 0"),
        ("bipartite", torch.tensor([1, 1]), (2, 2), "one-to-one"),
    ):
        with pytest.raises(DataError, match=message):
            UnitMatching(kind, partners, similarity, shape)  # pyright: ignore[reportArgumentType]
