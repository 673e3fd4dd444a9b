from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isthmus.base.batches import Batch
from isthmus.base.errors import CheckpointError, DataError, LayerNotFoundError, NotFiniteError
from isthmus.metrics import UnitFolds, unit_folds
from isthmus.metrics.folding_rows import Deal, FoldingRows, rows_before
from isthmus.metrics.joint_counts import JointCounts
from isthmus.metrics.moments import Moments
from isthmus.metrics.reading import one_side, reader


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make, seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make()


def mlp(seed=0, hidden=5):
    return seeded(lambda: nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3)), seed)


def cnn(seed=0):
    return seeded(lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)), seed)


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


class Tokens(nn.Module):
    def __init__(self, units=5):
        super().__init__()
        self.embed, self.pool = nn.Embedding(20, units), nn.Linear(units, 3)

    def forward(self, input_ids, attention_mask=None):
        return self.pool(self.embed(input_ids)[:, 0])


def token_batch(lengths, seed=0):
    ids = torch.randint(1, 20, (len(lengths), max(lengths) + 1), generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long(),
    }


def cross(x, y):
    x, y = (np.asarray(z.detach().double()) for z in (x, y))
    return (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)


def close(found, truth, tolerance=1e-6):
    np.testing.assert_allclose(found.numpy(), truth, rtol=0, atol=tolerance)


def same_moments(first: Moments, second: Moments, tolerance=1e-12):
    assert (first.names, first.pairs) == (second.names, second.pairs)
    for name in first.names:
        assert first.count(name) == second.count(name)
        close(first.mean(name), second.mean(name).numpy(), tolerance)
        close(first.variance(name), second.variance(name).numpy(), tolerance)
    for pair in first.pairs:
        close(first.covariance(*pair), second.covariance(*pair).numpy(), tolerance)


# Whose rows they are


@pytest.mark.parametrize("subsample", [None, 0.4])
@pytest.mark.parametrize(
    ("shape", "positions", "unit_axis"),
    [
        ((6, 3), "samples", None),
        ((6, 5, 3), "samples", None),
        ((6, 5, 3), "samples", 1),
        ((6, 3, 2, 4), "samples", None),
        ((6, 3, 2, 2, 2), "samples", None),
        ((6, 3, 2, 4), "features", None),
        ((6, 5, 3), "mean", None),
        ((24, 3), "samples", None),  # four tokens of each sample, in one axis with the samples
        ((24, 7, 3), "samples", None),  # four windows of each
        ((24, 7, 3), "mean", None),
    ],
)
def test_rows_tell_their_samples(shape, positions, unit_axis, subsample):
    """Each entry of the activation is the number of its sample."""

    def numbered(x):
        return x.repeat_interleave(shape[0] // 6).reshape(-1, *(1 for _ in shape[1:])).expand(shape).contiguous()

    model = nn.Sequential(Returns(numbered))
    options: dict[str, Any] = {"positions": positions, "unit_axis": unit_axis, "subsample": subsample}
    with reader([one_side(model, ["0"])], **options) as read:
        for start in (0, 10):
            rows = read(Batch((torch.arange(start, start + 6.0)[:, None],)))["0"]
            assert torch.equal(read.owners("0") + start, rows[:, 0].long())
            assert read.owners("0").dtype == torch.int64


@pytest.mark.parametrize("subsample", [None, 0.5])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("positions", ["samples", "mean"])
def test_rows_of_real_tokens_tell_their_samples(positions, flat, subsample):
    class Numbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Returns(lambda x: x.flatten(0, 1) if flat else x)

        def forward(self, x, attention_mask):
            return self.part(x)

    lengths = torch.tensor([3, 1, 4, 2])
    mask = torch.arange(5) < lengths[:, None]
    x = torch.where(mask[..., None], torch.arange(4.0)[:, None, None], -1.0).expand(4, 5, 2)
    batch = Batch((), {"x": x, "attention_mask": mask})
    with reader([one_side(Numbers(), ["part"])], positions=positions, subsample=subsample) as read:
        rows = read(batch)["part"]
        assert torch.equal(read.owners("part"), rows[:, 0].long())
        assert len(rows) == round((10 if positions == "samples" else 4) * (subsample or 1))


def test_rows_without_a_sample_are_refused():
    x = randn(4, 3)
    for shape in [(5, 3), (8, 4, 3)]:
        model = nn.Sequential(Returns(lambda _, shape=shape: torch.zeros(shape)))
        with reader([one_side(model, ["0"])]) as read:
            read(Batch((x,)))
            with pytest.raises(DataError, match=r"0 has shape .* for 4 samples: its first axis is not that"):
                read.owners("0")
            with pytest.raises(LayerNotFoundError, match="no layer '00' was read; did you mean 0"):
                read.owners("00")


# Folds and shuffled rows


@settings(max_examples=30, deadline=None)
@given(folds=st.integers(2, 7), counts=st.lists(st.integers(0, 20), max_size=6), seed=st.integers(-(2**70), 2**70))
def test_each_run_of_samples_has_every_fold_once_however_it_is_cut(folds, counts, seed):
    deal = Deal(folds, seed)
    dealt = torch.cat([torch.empty(0, dtype=torch.int64), *(deal(count) for count in counts)])
    assert len(dealt) == sum(counts)
    assert torch.equal(dealt, Deal(folds, seed)(sum(counts)))
    for run in dealt.split(folds):
        assert len(set(run.tolist())) == len(run)
        assert set(run.tolist()) <= set(range(folds))


def test_folds_are_random():
    first = torch.stack([Deal(4, seed)(8) for seed in range(400)])
    counts = torch.stack([(first == fold).sum(0) for fold in range(4)])
    assert ((counts - 100).abs() < 5 * (400 * 0.25 * 0.75) ** 0.5).all()
    assert (first[:, :4] != first[:, 4:]).any(1).float().mean() > 0.9  # 23 of 24


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_rows_before_are_those_of_the_sample_before(sizes):
    samples = [[(sample, place) for place in range(size)] for sample, size in enumerate(sizes)]
    expected = [before[place % len(before)] for before, sample in pairwise(samples) for place in range(len(sample))]
    latest, *rest = (torch.tensor(sample, dtype=torch.float64) for sample in samples)
    rows = torch.cat([latest.new_empty(0, 2), *rest])
    found = rows_before(latest, rows, torch.tensor(sizes[1:], dtype=torch.int64))
    assert found.tolist() == [list(map(float, row)) for row in expected]


def folded(batch_sizes, sizes, folds, held_bytes, nulls=True):
    """Rows (sample, place) of two layers, the second with one row for each sample, by fold."""
    found = {fold: {} for fold in range(folds)}

    def keep(groups):
        for fold, group in groups.items():
            for name, rows in group.items():
                found[fold].setdefault(name, []).append(rows.clone())

    folding = FoldingRows(folds, 3, {"x": "null"} if nulls else {}, keep, held_bytes)
    start = 0
    for count in batch_sizes:
        owners = torch.arange(count).repeat_interleave(torch.tensor(sizes[start : start + count]))
        place = torch.cat([torch.arange(size) for size in sizes[start : start + count]])
        rows = {"x": torch.stack([owners + start, place], 1).double()}
        rows["y"] = torch.arange(start, start + count)[:, None].double()
        folding.add(rows, {"x": owners, "y": torch.arange(count)}, count)
        for x in rows.values():
            x.fill_(-1)  # a reader writes over its rows
        start += count
    folding.finish()
    return {fold: {name: torch.cat(parts) for name, parts in group.items()} for fold, group in found.items()}


@settings(max_examples=30, deadline=None)
@given(
    batch_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    folds=st.integers(2, 4),
    held_bytes=st.sampled_from([1, 200, 1 << 20]),
    data=st.data(),
)
def test_shuffled_rows_are_of_another_sample_of_the_fold_each_once(batch_sizes, folds, held_bytes, data):
    batch_sizes = [2 * folds, *batch_sizes]
    count = sum(batch_sizes)
    equal = data.draw(st.booleans())
    sizes = [2] * count if equal else data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    found = folded(batch_sizes, sizes, folds, held_bytes)
    whole = folded([count], sizes, folds, 1 << 30)
    expected = Deal(folds, 3)(count)
    for fold, group in found.items():
        own, null = group["x"].long(), group["null"].long()
        assert sorted(group["y"].flatten().tolist()) == (expected == fold).nonzero().flatten().tolist()
        assert len(own) == sum(sizes[sample] for sample in group["y"].long().flatten())
        assert (own[:, 0] != null[:, 0]).all()
        assert (expected[null[:, 0]] == fold).all()
        assert len({(int(a), int(b)) for a, b in zip(own[:, 0], null[:, 0], strict=True)}) == len(group["y"])
        assert len(null[:, 0].unique()) == len(group["y"])
        for (_, place), (before, other) in zip(own.tolist(), null.tolist(), strict=True):
            assert other == place % sizes[before]
        together = torch.cat([own, null], 1)
        assert sorted(together.tolist()) == sorted(
            torch.cat([whole[fold]["x"], whole[fold]["null"]], 1).long().tolist()
        )


def test_a_fold_needs_samples():
    assert {len(group["y"]) for group in folded([3], [1] * 3, 3, 1, nulls=False).values()} == {1}
    with pytest.raises(DataError, match=r"fold \d has 1 of the 5 samples of 'x'.*3 folds needs at least 2.*shuffled="):
        folded([1] * 5, [1] * 5, 3, 1)
    with pytest.raises(DataError, match=r"fold \d has 0 of the 2 samples.*at least 1; pass more samples, fewer folds$"):
        folded([2], [1] * 2, 3, 1, nulls=False)
    with pytest.raises(DataError, match="shuffled=False"):
        unit_folds(mlp(), mlp(1), list(randn(3, 4).split(1)), folds=2, held_out=1)


# Moments


def rows_by_hand(model, x):
    """Activations of the layers of `cnn`, each as rows, and the number of rows of a sample."""
    with torch.no_grad():
        conv = model[0](x)
        out = model[3](conv.relu().flatten(1))
    return {"0": (conv.permute(0, 2, 3, 1).reshape(-1, 3), 9), "1": (conv.relu().permute(0, 2, 3, 1).reshape(-1, 3), 9),
            "3": (out, 1)}  # fmt: skip


def test_moments_of_each_fold_are_those_of_its_samples():
    a, b, x = cnn(0), cnn(1), randn(53, 1, 4, 4)
    found = unit_folds(a, b, list(x.split(8)), folds=5, seed=7)
    rows = {"model_a": rows_by_hand(a, x), "model_b": rows_by_hand(b, x)}
    assert found.layer_names == (("0", "0"), ("1", "1"), ("3", "3"))
    assert found.pairs == tuple((f"model_a.{one}", f"model_b.{two}") for one, two in found.layer_names)
    assert (found.samples, len(found.folds), len(found.train_parts)) == (53, 5, 3)
    parts = [(moments, found.assignment == fold) for fold, moments in enumerate(found.folds)]
    parts += [(found.train, found.assignment < 3), (found.held_out, found.assignment >= 3)]
    parts += [(found.all, found.assignment >= 0)]
    assert all(kept.any() for _, kept in parts)
    for moments, kept in parts:
        for layer in "013":
            (one, places), (two, _) = rows["model_a"][layer], rows["model_b"][layer]
            one, two = one[kept.repeat_interleave(places)], two[kept.repeat_interleave(places)]
            names = f"model_a.{layer}", f"model_b.{layer}"
            assert moments.count(names[0]) == len(one)
            close(moments.mean(names[1]), two.double().mean(0).numpy())
            for first, second, truth in [(0, 1, (one, two)), (0, 0, (one, one)), (1, 1, (two, two))]:
                close(moments.covariance(names[first], names[second]), cross(*truth))


def test_the_size_of_the_batches_does_not_show():
    a, b, x = cnn(0), cnn(1), randn(150, 1, 4, 4)
    seven = unit_folds(a, b, list(x.split(7)))
    for size in (1, 64, 150):
        other = unit_folds(a, b, iter(x.split(size)))  # one pass is enough
        for first, second in zip(seven.folds, other.folds, strict=True):
            same_moments(first, second, 1e-6)
    moved = unit_folds(a, b, x, seed=1)
    assert not torch.equal(moved.assignment, seven.assignment)


def test_merging_leaves_the_folds_alone():
    found = unit_folds(mlp(0), mlp(1), randn(60, 4))
    again = unit_folds(mlp(0), mlp(1), randn(60, 4))
    assert found.train is found.train
    assert found.held_out is found.held_out
    assert found.all.count("model_a.0") == 60
    assert found.train.count("model_a.0") == 48
    for first, second in zip(found.folds, again.folds, strict=True):
        same_moments(first, second, 0)
    one_pass = Moments([found.pairs[0]])
    with torch.no_grad():
        one_pass.update(
            {name: model[0](randn(60, 4)) for name, model in zip(found.pairs[0], (mlp(0), mlp(1)), strict=True)}
        )
    close(found.all.correlation(*found.pairs[0]), one_pass.correlation(*found.pairs[0]).numpy())


def test_the_null_of_a_network_with_itself_is_nothing():
    n = 4000
    model = mlp(hidden=20)
    found = unit_folds(model, model, list(randn(n, 4).split(500)), layers="0", folds=4)
    assert found.pairs == (("0", "0"),)
    assert (found.samples, found.all.pairs) == (n, (("0", "0"), ("0", "0 (shuffled)")))
    null = found.null_name("0")
    close(found.all.correlation("0", "0").diag(), np.ones(20), 1e-9)
    shuffled = found.all.correlation("0", null) * n**0.5
    # The units are mixtures of four inputs: with those, sixteen independent correlations of variance 1 / n.
    assert shuffled.abs().max() < 6
    assert 0.3 < shuffled.square().mean() < 3
    for moments in found.folds:  # the same rows in another order
        close(moments.mean(null), moments.mean("0").numpy(), 1e-9)
        close(moments.variance(null), moments.variance("0").numpy(), 1e-9)


def test_the_null_keeps_places():
    # Every sample is the same image, so that what is shared between places is all there is.
    x = randn(1, 1, 4, 4).expand(30, 1, 4, 4)
    found = unit_folds(cnn(0), cnn(1), x, layers="0", folds=3, held_out=1)
    a, b = found.pairs[0]
    close(found.all.covariance(a, found.null_name(b)), found.all.covariance(a, b).numpy(), 1e-9)
    assert found.all.covariance(a, b).abs().max() > 1e-3


def test_networks_come_back_and_one_network_runs_once():
    model, calls = mlp().train(), []
    model.register_forward_pre_hook(lambda *_: calls.append(model.training))
    unit_folds(model, model, list(randn(40, 4).split(20)), folds=2, held_out=1)
    assert calls == [False, False]
    assert model.training
    assert model[0].training


def test_options_choose_what_is_kept():
    a, b, x = mlp(0), mlp(1), randn(60, 4)
    every = unit_folds(a, b, x, pairs="all", folds=3, held_out=1)
    assert len(every.pairs) == 9
    assert len(every.all.pairs) == 9 + 6 + 9
    few = unit_folds(a, b, x, pairs="all", folds=3, held_out=1, within=False, shuffled=False)
    assert set(few.all.pairs) == set(few.pairs) == set(every.pairs)
    for pair in few.pairs:
        close(few.all.covariance(*pair), every.all.covariance(*pair).numpy(), 1e-12)
    assert few.convention == {
        **{"positions": "samples", "mask": None, "subsample": None},
        **{"folds": 3, "held_out": 1, "shuffled": False, "seed": 0, "samples": 60},
    }
    with pytest.raises(DataError, match=r"no shuffled samples of 'model_b\.0' were kept; run unit_folds with"):
        few.null_name("model_b.0")
    with pytest.raises(LayerNotFoundError, match=r"no pair has 'model_b\.7' as its second layer; did you mean"):
        every.null_name("model_b.7")
    half = unit_folds(a, b, x, product_dtype=torch.float32)
    assert half.all.product_dtype == torch.float32


def test_pairs_of_other_layers_of_other_networks():
    a, b, x = cnn(0), nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh()), randn(80, 1, 4, 4)
    given = [("3", "1"), ("3", "2"), ("3", "1")]
    found = unit_folds(a, b, x, pairs=iter(given))
    assert found.layer_names == (("3", "1"), ("3", "2"))
    assert found.all.names == ("model_a.3", "model_b.1", "model_b.2", "model_b.1 (shuffled)", "model_b.2 (shuffled)")
    with torch.no_grad():
        close(found.all.covariance("model_a.3", "model_b.2"), cross(a(x), b(x)))
    both = unit_folds(a, a, x, pairs=[("0", "1"), ("1", "0")], shuffled=False, within=False)
    assert both.pairs == (("0", "1"), ("1", "0"))
    assert both.all.pairs in [(("0", "1"),), (("1", "0"),)]
    assert torch.equal(both.all.covariance("0", "1"), both.all.covariance("1", "0").T)
    lstm = nn.Sequential(nn.LSTM(4, 3, batch_first=True))
    assert unit_folds(lstm, lstm, randn(40, 5, 4), pairs=[("0", "0")]).layer_names == (("0[0]", "0[0]"),)


def test_padding_counts_for_nothing_and_a_sample_stays_whole():
    a, b = seeded(Tokens), seeded(lambda: Tokens(4), 1)
    lengths = torch.randint(1, 6, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    data = [token_batch(lengths[start : start + 9], start) for start in range(0, 50, 9)]
    found = unit_folds(a, b, data, folds=4, held_out=1)
    tokens = [ids[:length] for batch in data for ids, length in zip(
        batch["input_ids"], batch["attention_mask"].sum(1).tolist(), strict=True)]  # fmt: skip
    assert [len(ids) for ids in tokens] == lengths
    names = "model_a.embed", "model_b.embed"
    for fold, moments in enumerate(found.folds):
        ids = torch.cat([tokens[sample] for sample in (found.assignment == fold).nonzero().flatten()])
        assert moments.count(names[0]) == len(ids) == moments.count(found.null_name(names[1]))
        close(moments.covariance(*names), cross(a.embed.weight[ids], b.embed.weight[ids]))
    whole = unit_folds(a, b, data, folds=4, held_out=1, positions="mean")
    assert whole.all.count("model_a.embed") == 50


@pytest.mark.parametrize("shuffled", [True, False])
def test_a_subsample_is_dealt_whole(shuffled):
    a, b, x = cnn(0), cnn(1), randn(200, 1, 4, 4)
    found = unit_folds(a, b, list(x.split(20)), subsample=0.3, folds=4, shuffled=shuffled)
    assert [found.all.count(f"model_a.{layer}") for layer in "013"] == [540, 540, 60]
    assert found.convention["subsample"] == 0.3


# Information


def test_joint_counts_are_of_the_same_bins_in_training_and_held_out_folds():
    a, b, x = mlp(0), mlp(1), randn(200, 4)
    found = unit_folds(a, b, list(x.split(50)), layers="0", folds=5, held_out=2, information=True, bins=4)
    train, held_out = found.counts_train, found.counts_held_out
    assert train is not None
    assert held_out is not None
    assert (train.count("model_a.0"), held_out.count("model_a.0")) == (120, 80)
    with torch.no_grad():
        rows = {"model_a.0": a[0](x).double(), "model_b.0": b[0](x).double()}
    for counts, kept in ((train, found.assignment < 3), (held_out, found.assignment >= 3)):
        for name in rows:
            assert torch.equal(counts.edges[name], train.edges[name])
            # Quartiles of the first batch: an edge has a quarter of its rows at or below it.
            below = (rows[name][:50, :, None] <= counts.edges[name]).double().mean(0)
            assert ((below >= torch.tensor([0.25, 0.5, 0.75])) & (below < torch.tensor([0.25, 0.5, 0.75]) + 0.02)).all()
        information = counts.mutual_information(*found.pairs[0])
        for i, j in [(0, 0), (1, 3), (4, 2)]:
            values = [rows[name][kept, unit].numpy() for name, unit in zip(rows, (i, j), strict=True)]
            cuts = [counts.edges[name][unit].numpy() for name, unit in zip(rows, (i, j), strict=True)]
            joint = np.zeros((4, 4))
            np.add.at(joint, tuple(np.searchsorted(c, v, side="left") for c, v in zip(cuts, values, strict=True)), 1)
            p = joint / joint.sum()
            independent = p.sum(1, keepdims=True) * p.sum(0)
            assert information[i, j] == pytest.approx((p[p > 0] * np.log(p[p > 0] / independent[p > 0])).sum())


def test_a_first_batch_that_is_too_small_for_bins_is_refused():
    with pytest.raises(DataError, match=r"layer 'model_a\.0': the 5 rows of the first batch are too few for 10 bins"):
        unit_folds(mlp(0), mlp(1), list(randn(60, 4).split(5)), information=True)


def test_how_much_is_held_back_does_not_show(monkeypatch):
    def found():
        return unit_folds(cnn(0), cnn(1), list(randn(60, 1, 4, 4).split(1)), layers="0", bins=3, information=True)

    at_once = found()
    monkeypatch.setattr("isthmus.metrics.folding_rows._HELD_BYTES", 1)
    one_by_one = found()
    for first, second in zip(at_once.folds, one_by_one.folds, strict=True):
        same_moments(first, second)
    for name in ("counts_train", "counts_held_out"):
        first, second = (getattr(folds, name)._to_file()[1] for folds in (at_once, one_by_one))
        assert all(torch.equal(first[key], second[key]) for key in first)


# Files


@pytest.mark.parametrize("information", [False, True])
def test_folds_come_back_from_a_file(information, tmp_path):
    found = unit_folds(mlp(0), mlp(1), randn(80, 4), folds=4, held_out=1, information=information, seed=5)
    read = UnitFolds.load(found.save(tmp_path / "folds.safetensors"))
    for name in ("pairs", "layer_names", "held_out_folds", "samples", "convention"):
        assert getattr(read, name) == getattr(found, name)
    assert torch.equal(read.assignment, found.assignment)
    assert len(read.folds) == 4
    for first, second in zip(read.folds, found.folds, strict=True):
        same_moments(first, second, 0)
    same_moments(read.held_out, found.held_out, 0)
    for first, second in ((read.counts_train, found.counts_train), (read.counts_held_out, found.counts_held_out)):
        if information:
            assert first is not None
            assert second is not None
            assert torch.equal(first.mutual_information(*found.pairs[1]), second.mutual_information(*found.pairs[1]))
        else:
            assert first is second is None
    assert found.save(tmp_path / "again").read_bytes() == (tmp_path / "folds.safetensors").read_bytes()


def test_other_files_are_refused(tmp_path):
    moments = Moments()
    moments.update({"x": randn(5, 2)})
    with pytest.raises(CheckpointError, match="holds no unit folds"):
        UnitFolds.load(moments.save(tmp_path / "moments"))
    found = unit_folds(mlp(0), mlp(1), randn(40, 4), folds=2, held_out=1)
    content = found.save(tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="not a whole file of unit folds"):
        UnitFolds.load(tmp_path / "cut")


# Refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"folds": 1}, DataError, "folds is 1; expected a whole number, at least 2"),
        ({"folds": 2.0}, DataError, "folds is 2.0"),
        ({"held_out": 0}, DataError, "held_out is 0; expected a whole number of the 10 folds, from 1 to 9"),
        ({"folds": 3, "held_out": 3}, DataError, "held_out is 3"),
        ({"bins": 1}, DataError, "bins is 1"),
        ({"seed": 0.5}, DataError, "seed is 0.5; expected an integer"),
        ({"product_dtype": torch.float16}, DataError, "product_dtype is torch.float16"),
        ({"pairs": "some"}, DataError, "pairs is 'some'; expected 'same', 'all' or pairs of names"),
        ({"pairs": ["ab"]}, DataError, r"pairs holds 'ab'; expected \(layer of a, layer of b\)"),
        ({"pairs": [("0", 1)]}, DataError, r"pairs holds \('0', 1\)"),
        ({"pairs": []}, DataError, "pairs holds none"),
        ({"pairs": [("0", "0")], "layers": "0"}, DataError, "layers and pairs both name layers"),
        ({"pairs": [("0", "9")]}, LayerNotFoundError, "no layer '9'"),
        ({"layers": (["0"], ["2"])}, DataError, r"other names, 0 and 2; give the pairs .* or pairs='all'"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        unit_folds(mlp(0), mlp(1), randn(60, 4), **options)


def test_layers_of_a_pair_need_rows_of_the_same_samples():
    x = randn(60, 1, 4, 4)
    with pytest.raises(DataError, match=r"'model_a\.0' and 'model_b\.3' have 540 and 60 samples.*positions='mean'"):
        unit_folds(cnn(0), cnn(1), x, pairs="all")
    unit_folds(cnn(0), cnn(1), x, pairs="all", positions="mean")

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x, first, second):
            return self.one(x), self.two(x)

    masks = {"first": torch.tensor([[1, 1], [1, 0]] * 9), "second": torch.tensor([[1, 0], [1, 1]] * 9)}
    model, parts = Two(), {"one": "first", "two": "second"}
    options: dict[str, Any] = {"mask": parts, "folds": 2, "held_out": 1}
    with pytest.raises(DataError, match="'one' and 'two' both have 27 rows, but not as many of each sample"):
        unit_folds(model, model, [{"x": randn(18, 2, 3), **masks}], pairs=[("one", "two")], **options)
    unit_folds(model, model, [{"x": randn(18, 2, 3), **masks}], pairs=[("one", "one")], **options)


def test_of_several_outputs_the_first_is_paired():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.linear = Returns(lambda x: {"left": x, "right": -x}), nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(self.part(x)["left"])

    model = Pair()
    found = unit_folds(model, model, randn(40, 4), pairs=[("part", "part[right]")], folds=2, held_out=1)
    assert found.layer_names == (("part[left]", "part[right]"),)
    close(found.all.correlation(*found.pairs[0]).diag(), -np.ones(4), 1e-9)
    found = unit_folds(model, model, randn(40, 4), pairs=[("part", "linear"), ("part[right]", "linear")])
    assert found.layer_names == (("part[left]", "linear"), ("part[right]", "linear"))


def test_too_much_memory_is_refused_before_it_is_taken():
    a, b, x = mlp(0, 64), mlp(1, 64), randn(200, 4)
    # Products of 64 x 64, 64 x 64 and 3 x 3, four of each; three sums of 131 + 131 + 131 units; 10 + 2 times.
    needed = 12 * 8 * (4 * (2 * 64**2 + 9) + 3 * 3 * 131)
    unit_folds(a, b, x, max_bytes=needed)
    remedies = "fewer folds, fewer layers or pairs, within=False, shuffled=False, or a larger"
    with pytest.raises(DataError, match=rf"of their two merged parts would take 0\.00\d+ GiB.*{remedies}"):
        unit_folds(a, b, x, max_bytes=needed - 1)
    counts = 2 * 8 * (2 * 64**2 + 9) * 9
    unit_folds(a, b, x, max_bytes=needed + counts, information=True, bins=3)
    with pytest.raises(DataError, match="shuffled=False, fewer bins, or a larger max_bytes"):
        unit_folds(a, b, x, max_bytes=needed + counts - 1, information=True, bins=3)
    with pytest.raises(DataError, match="fewer layers or pairs, or a larger"):
        unit_folds(a, b, x, max_bytes=100, within=False, shuffled=False)


def test_bad_data_is_refused():
    with pytest.raises(DataError, match="no batch"):
        unit_folds(mlp(0), mlp(1), [])
    broken = mlp(1)
    with torch.no_grad():
        broken.get_parameter("0.bias")[0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"model_b\.0 of shape \(60, 5\) holds NaN"):
        unit_folds(mlp(0), broken, randn(60, 4))


def test_units_that_do_not_vary_have_no_variance():
    model = mlp()
    with torch.no_grad():
        model.get_parameter("0.weight")[2] = 0
    found = unit_folds(model, model, randn(60, 4), layers="0")
    assert (found.all.variance("0") == 0).tolist() == [False, False, True, False, False]
    assert found.all.variance(found.null_name("0"))[2] == 0


def test_progress_counts_the_batches(capsys):
    unit_folds(mlp(0), mlp(1), list(randn(60, 4).split(20)), progress=True)
    assert "0/3" in capsys.readouterr().err


def test_counts_have_no_tensor_in_common():
    found = unit_folds(mlp(0), mlp(1), randn(80, 4), information=True)
    assert isinstance(found.counts_train, JointCounts)
    assert found.counts_held_out is not None
    shared = found.counts_train.edges["model_a.0"].data_ptr() == found.counts_held_out.edges["model_a.0"].data_ptr()
    assert not shared
