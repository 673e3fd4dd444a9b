"""Task vectors against the published algorithms, written out entry by entry in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError
from isthmus.merge.task_vectors import TaskVectors, dare, slerp, task_arithmetic, task_vector, ties

SHAPES = {"a.weight": (3, 4), "a.bias": (3,), "b.weight": (2, 3)}


def family(count, seed=0, shapes=None, dtype=torch.float64):
    """A parent, and networks that were fine-tuned from it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES if shapes is None else shapes

    def draw(scale):
        return {
            name: (torch.randn(shape, generator=generator, dtype=torch.float64) * scale)
            for name, shape in shapes.items()
        }

    base = draw(1.0)
    tasks = [{name: (base[name] + change).to(dtype) for name, change in draw(0.3).items()} for _ in range(count)]
    return tasks, {name: tensor.to(dtype) for name, tensor in base.items()}


def flat(state, names=None):
    return np.concatenate([state[name].double().numpy().ravel() for name in (names or sorted(state))])


def literal_ties(vectors, density, weights=None):
    """Algorithm 1 of Yadav et al., one parameter at a time."""
    weights = [1.0] * len(vectors) if weights is None else weights
    size = len(vectors[0])
    kept = max(1, round(density * size))
    trimmed = []
    for vector in vectors:
        least = sorted((abs(entry) for entry in vector), reverse=True)[kept - 1]
        trimmed.append([entry if abs(entry) >= least else 0.0 for entry in vector])
    merged = []
    for p in range(size):
        gamma = np.sign(sum(w * t[p] for w, t in zip(weights, trimmed, strict=True)))
        agreeing = [(w, t[p]) for w, t in zip(weights, trimmed, strict=True) if np.sign(t[p]) == gamma]
        total = sum(w for w, _ in agreeing)
        merged.append(sum(w * entry for w, entry in agreeing) / total if total else 0.0)
    return np.array(merged)


def test_a_task_vector_is_the_difference():
    tasks, base = family(1)
    found = task_vector(tasks[0], base)
    assert list(found) == list(base)
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.numpy(), tasks[0][name].numpy() - base[name].numpy())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(0, 999), st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_arithmetic_is_the_sum_of_scaled_differences(count, seed, scales):
    tasks, base = family(count, seed)
    merged = task_arithmetic(tasks, base, scale=scales[:count])
    expected = flat(base) + sum(s * (flat(t) - flat(base)) for s, t in zip(scales[:count], tasks, strict=True))
    np.testing.assert_allclose(flat(merged), expected, atol=1e-13)
    same = task_arithmetic(tasks, base, scale=scales[0])
    np.testing.assert_allclose(
        flat(same), flat(base) + scales[0] * sum(flat(t) - flat(base) for t in tasks), atol=1e-13
    )


def test_arithmetic_by_hand():
    base = {"w": torch.tensor([1.0, 1.0, 0.0])}
    tasks = [{"w": torch.tensor([2.0, 1.0, 4.0])}, {"w": torch.tensor([1.0, -3.0, 0.0])}]
    assert task_arithmetic(tasks, base, scale=1.0)["w"].tolist() == [2, -3, 4]
    assert task_arithmetic(tasks, base)["w"].tolist() == pytest.approx([1.4, -0.6, 1.6])
    # negation takes the first task away and adds half of the second
    assert task_arithmetic(tasks, base, scale=[-1, 0.5])["w"].tolist() == [0, -1, -4]
    # three to one, of mean one: 1.5 and 0.5
    assert task_arithmetic(tasks, base, scale=1.0, weights=[3, 1])["w"].tolist() == [2.5, -1, 6]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 999), st.sampled_from([0.05, 0.2, 0.5, 0.8, 1.0]), st.floats(-1, 2))
def test_ties_is_the_published_algorithm(count, seed, density, scale):
    tasks, base = family(count, seed)
    merged = ties(tasks, base, density=density, scale=scale)
    vectors = [flat(task) - flat(base) for task in tasks]
    np.testing.assert_allclose(flat(merged), flat(base) + scale * literal_ties(vectors, density), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.int8, (3, 8), elements=st.integers(-3, 3)),
    st.sampled_from([0.125, 0.25, 0.5, 1.0]),
    st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 0, 3)]),
)
def test_ties_with_equal_magnitudes_zero_sums_and_weights(vectors, density, weights):
    # Small integers: many entries at the threshold, and signs that cancel.
    base = {"w": torch.zeros(5), "v": torch.zeros(3)}
    tasks = [{"w": torch.tensor(v[3:]).float(), "v": torch.tensor(v[:3]).float()} for v in vectors]
    merged = ties(tasks, base, density=density, weights=weights)
    expected = literal_ties([v.astype(float) for v in vectors], density, weights)
    np.testing.assert_allclose(flat(merged), expected, atol=1e-6)  # v comes before w


def test_ties_by_hand():
    base = {"w": torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])}
    changes = [[5.0, -4.0, 3.0, 0.1, 2.0], [1.0, 6.0, -3.0, 0.1, -0.5], [4.0, 1.0, 0.2, -7.0, -2.0]]
    tasks = [{"w": base["w"] + torch.tensor(change)} for change in changes]
    # 60 % of five: three each. Kept: 5 -4 3 | 1 6 -3 | 4 -7 -2. The third sums to zero.
    assert ties(tasks, base, density=0.6)["w"].tolist() == pytest.approx([1 + 10 / 3, 7, 1, -6, -1])
    # trimmed as one vector: the largest entries may all be in one tensor
    two = {"v": torch.zeros(2), "w": torch.zeros(2)}
    only = ties([{"v": torch.tensor([9.0, 8.0]), "w": torch.tensor([1.0, 2.0])}], two, density=0.5)
    assert only["v"].tolist() == [9, 8]
    assert only["w"].tolist() == [0, 0]


def test_dare_drops_independently_and_rescales():
    shapes = {"w": (100, 100), "v": (2000,)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tasks = [{name: torch.ones(shape) for name, shape in shapes.items()} for _ in range(2)]
    kept = [dare(tasks, base, drop=0.75, scale=scale, seed=4) for scale in ([1, 0], [0, 1])]
    for state in kept:
        for tensor in state.values():
            assert set(tensor.unique().tolist()) == {0, 4}
            assert float(tensor.mean()) == pytest.approx(1, abs=0.12)
    both = (kept[0]["w"] != 0) & (kept[1]["w"] != 0)
    assert float(both.float().mean()) == pytest.approx(1 / 16, abs=0.01)
    plain = dare(tasks, base, drop=0.75, rescale=False, scale=[1, 0], seed=4)
    assert torch.equal(plain["w"] * 4, kept[0]["w"])
    again = dare(tasks, base, drop=0.75, scale=[1, 0], seed=4)
    assert torch.equal(again["w"], kept[0]["w"])
    assert not torch.equal(dare(tasks, base, drop=0.75, scale=[1, 0], seed=5)["w"], kept[0]["w"])
    backwards = [{name: task[name] for name in ("v", "w")} for task in tasks]
    assert torch.equal(dare(backwards, base, drop=0.75, scale=[1, 0], seed=4)["w"], kept[0]["w"])


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_dare_merges_what_is_left_by_arithmetic_or_ties(density):
    tasks, base = family(3, seed=2)
    thinned = [flat(dare(tasks, base, drop=0.5, scale=list(row), seed=1)) - flat(base) for row in np.eye(3).tolist()]
    summed = dare(tasks, base, drop=0.5, seed=1)
    np.testing.assert_allclose(flat(summed), flat(base) + 0.4 * sum(thinned), atol=1e-12)
    merged = dare(tasks, base, drop=0.5, combine="ties", density=density, seed=1)
    np.testing.assert_allclose(flat(merged), flat(base) + literal_ties(thinned, density), atol=1e-12)


def test_dare_that_drops_nothing_is_the_plain_method():
    tasks, base = family(3, dtype=torch.float32)
    for combine, plain in (
        ("arithmetic", task_arithmetic(tasks, base)),
        ("ties", ties(tasks, base, density=0.3)),
    ):
        found = dare(tasks, base, drop=0, combine=combine, density=0.3)
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def rotated(u, v, t):
    """From u towards v by t of the angle between them, in the basis that Gram and Schmidt give of their plane."""
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    rest = v - (u @ v) * u
    rest /= np.linalg.norm(rest)
    angle = math.atan2(v @ rest, u @ v)
    return math.cos(t * angle) * u + math.sin(t * angle) * rest


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.floats(0.01, 1))
def test_slerp_is_a_rotation_in_the_plane_of_the_two(seed, t):
    (a, b), _ = family(2, seed)
    for names in ([name] for name in SHAPES):
        u, v = flat(a, names), flat(b, names)
        found = flat(slerp([a, b], weights=[1 - t, t]), names)
        length = (1 - t) * np.linalg.norm(u) + t * np.linalg.norm(v)
        np.testing.assert_allclose(found, length * rotated(u, v, t), atol=1e-9)
    u, v = flat(a), flat(b)
    found = flat(slerp([a, b], weights=[1 - t, t], whole=True))
    length = (1 - t) * np.linalg.norm(u) + t * np.linalg.norm(v)
    np.testing.assert_allclose(found, length * rotated(u, v, t), atol=1e-9)


def test_slerp_as_given_uses_the_vectors_as_they_are():
    a, b = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 4.0])}
    half = math.sin(math.pi / 4)
    assert slerp([a, b], norm="as_given")["w"].tolist() == pytest.approx([2 * half, 4 * half])
    third = slerp([a, b], weights=[2, 1], norm="as_given")["w"].tolist()
    assert third == pytest.approx([2 * math.sin(math.pi / 3), 4 * math.sin(math.pi / 6)])


@pytest.mark.parametrize("other", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0], [1.0, 2.0 + 1e-8]])
def test_slerp_without_a_circle_is_the_straight_mean(other):
    a, b = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    found = slerp([{"w": a}, {"w": b}], weights=[3, 1])["w"]
    torch.testing.assert_close(found, 0.75 * a + 0.25 * b, rtol=0, atol=1e-12)


METHODS = {
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "slerp": lambda states, base, **options: slerp((states * 2)[:2], **options),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_merged_with_itself_stays_bit_for_bit(method, dtype):
    (state,), _ = family(1, dtype=dtype)
    before = copy.deepcopy(state)
    found = METHODS[method]([state, state], state)
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, before[name])
        assert torch.equal(state[name], before[name])
        assert tensor.data_ptr() != state[name].data_ptr()


@pytest.mark.parametrize("method", METHODS)
def test_counts_masks_and_statistics(method):
    tasks, base = family(2, dtype=torch.float32)
    variances = [[1.0, 2.0], [4.0, 1.0], [2.0, 1.5]]
    for number, (state, variance) in enumerate(zip([*tasks, base], variances, strict=True)):
        state["steps"] = torch.tensor(number)
        state["mask"] = torch.tensor([0.0, -torch.inf])
        state["norm.running_var"] = torch.tensor(variance)
        state["own"] = torch.tensor(variance)
    found = METHODS[method](tasks, base)
    assert list(found) == list(tasks[0])
    assert found["steps"] == 0
    assert found["mask"].tolist() == [0, -torch.inf]
    assert found["norm.running_var"].tolist() == [2.5, 1.5]
    given = METHODS[method](tasks, base, statistics={"own"})
    assert given["own"].tolist() == [2.5, 1.5]
    assert given["norm.running_var"].tolist() != [2.5, 1.5]


@pytest.mark.parametrize("method", METHODS)
def test_tied_tensors_stay_tied_and_count_once(method):
    tasks, base = family(2, shapes={"body": (4, 4), "head": (5, 4)}, dtype=torch.float32)
    twice = [{"body": s["body"], "head": s["head"], "z.tied": s["head"].clone()} for s in [*tasks, base]]
    plain = METHODS[method](tasks, base)
    found = METHODS[method](twice[:2], twice[2])
    assert torch.equal(found["z.tied"], found["head"])
    assert torch.equal(found["body"], plain["body"])
    assert torch.equal(found["head"], plain["head"])


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare"])
def test_each_network_may_have_its_own_parent(method):
    tasks, base = family(2)
    other = {name: tensor + 7 for name, tensor in base.items()}
    moved = [tasks[0], {name: tensor + 7 for name, tensor in tasks[1].items()}]
    one, own = METHODS[method](tasks, base), METHODS[method](moved, [base, other])
    for name in one:
        torch.testing.assert_close(one[name], own[name])


def test_it_computes_wide_and_gives_the_type_of_the_first():
    base = {"w": torch.full((1,), 256.0, dtype=torch.bfloat16)}
    # in bfloat16 256 + 0.5 is 256; in float32 four times that is seen
    tasks = [{"w": torch.full((1,), 256.5)} for _ in range(8)]
    found = task_arithmetic(tasks, base, scale=1.0)["w"]
    assert found.dtype == torch.float32
    assert found.item() == 260
    mixed = [{"w": torch.full((1,), 258.0, dtype=torch.bfloat16)}, {"w": torch.full((1,), 256.5, dtype=torch.float64)}]
    assert task_arithmetic(mixed, base, scale=1.0)["w"].dtype == torch.bfloat16
    assert ties(mixed, base, density=1.0)["w"].dtype == torch.bfloat16
    assert len(TaskVectors.between(mixed, base)) == 2


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("task_arithmetic", {"scale": [1.0]}, "1 numbers for 2 networks"),
        ("task_arithmetic", {"scale": math.nan}, "expected finite numbers"),
        ("task_arithmetic", {"weights": [1, -1]}, "none negative"),
        ("ties", {"density": 0}, "0 < density ≤ 1"),
        ("ties", {"density": 1.1}, "0 < density ≤ 1"),
        ("ties", {"density": "all"}, "density is 'all'"),
        ("ties", {"scale": [1, 2]}, "takes one number"),
        ("dare", {"drop": 1}, "0 ≤ drop < 1"),
        ("dare", {"drop": -0.1}, "0 ≤ drop < 1"),
        ("dare", {"combine": "tie"}, "did you mean ties"),
        ("dare", {"combine": "ties", "density": 2}, "0 < density ≤ 1"),
        ("dare", {"scale": math.inf}, "expected finite numbers"),
        ("slerp", {"norm": "given"}, "choose 'interpolated' or 'as_given'"),
        ("slerp", {"weights": [1, 2, 3]}, "3 weights for 2"),
    ],
)
def test_refuses_options(method, options, message):
    tasks, base = family(2)
    with pytest.raises(DataError, match=message):
        METHODS[method](tasks, base, **options)


def test_refuses_networks():
    tasks, base = family(3)
    with pytest.raises(DataError, match="there are 3"):
        slerp(tasks)
    with pytest.raises(DataError, match="2 bases for 3 networks"):
        ties(tasks, [base, base])
    with pytest.raises(ArchitectureError, match=r"0 and base .* only 0 has a.bias"):
        ties(tasks, {name: tensor for name, tensor in base.items() if name != "a.bias"})
    wrong = {**base, "a.bias": torch.zeros(4)}
    with pytest.raises(ArchitectureError, match=r"a.bias: \(3,\) in 0, \(4,\) in base 1"):
        dare(tasks, [base, wrong, base])
    with pytest.raises(ArchitectureError, match=r"a.bias: \(3,\) in 0, \(4,\) in base"):
        task_vector(tasks[0], wrong)
    broken = {**base, "b.weight": torch.full((2, 3), torch.nan)}
    with pytest.raises(NotFiniteError, match=r"base: b.weight of shape \(2, 3\)"):
        task_arithmetic(tasks, broken)
    complexes = [{"w": torch.ones(2, dtype=torch.complex64) * n} for n in (1, 2)]
    for merge in (lambda: ties(complexes, complexes[0]), lambda: slerp(complexes)):
        with pytest.raises(DataError, match="w is complex"):
            merge()
    assert task_arithmetic(complexes, complexes[0], scale=1.0)["w"].tolist() == [2, 2]
