from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from isthmus.base.batches import Batch
from isthmus.base.errors import DataError, LayerNotFoundError, NotFiniteError
from isthmus.metrics import cka
from isthmus.metrics.collect import collect, identities
from isthmus.metrics.gram import Gram


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(inplace=True), nn.Linear(10, 3))


def truth(model, x):
    with torch.no_grad():
        first = model[0](x)
        return {"0": first, "1": first.relu(), "2": model[2](first.relu())}


def prints_of(gram):
    assert gram.samples is not None
    return gram.samples


def centred(x):
    return x.double() - x.double().mean(0)


def test_rows_are_those_of_all_batches_in_order():
    model, x = net(), randn(70, 6)
    gram = collect(model, list(x.split(20)))
    assert gram.names == ("0", "1", "2")
    for name, rows in truth(model, x).items():
        assert gram.count(name) == 70
        np.testing.assert_allclose(gram.rows(name), centred(rows), atol=1e-6)
        np.testing.assert_allclose(gram.mean(name), rows.double().mean(0), atol=1e-6)


def test_only_the_last_batch_would_give_something_else():
    x = randn(90, 6)
    grams = [[collect(net(seed), data) for seed in (1, 2)] for data in (x, list(x.split(25)), x[75:])]
    whole, split, last = (cka(a.rows("2"), b.rows("2")) for a, b in grams)
    assert split == pytest.approx(whole, abs=1e-6)
    assert abs(last - whole) > 0.01


def test_an_in_place_relu_does_not_reach_back_into_batch_norm():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)).eval()
    x = randn(40, 3, 8, 8)
    gram = collect(model, [x[:25], x[25:]])
    with torch.no_grad():
        before = model[1](model[0](x)).movedim(1, -1).flatten(0, 2)
    value = cka(gram.rows("1"), gram.rows("2"))
    assert value == pytest.approx(cka(before, before.relu()), abs=1e-6)
    assert value < 0.95


def test_layers_may_differ_in_their_number_of_rows():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3))
    gram = collect(model, [randn(4, 1, 4, 4), randn(3, 1, 4, 4)])
    assert [gram.count(name) for name in gram.names] == [28, 7, 7]
    assert len(prints_of(gram)) == 7


def test_options_reach_the_reader_and_the_store():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 1))
    x = randn(10, 1, 4, 4)
    gram = collect(model, x, layers="1", positions="mean", dtype=torch.float64, max_bytes=0, progress=False)
    assert (gram.names, gram.count("1"), gram.dtype, gram.spilled) == (("1",), 10, torch.float64, 240)
    assert collect(model, x, subsample=0.25, seed=3).count("0") == 10
    assert collect(model, x, unit_axis=-1).units("0") == 2
    features = collect(model, x, positions="features")
    assert (features.count("0"), features.units("0")) == (10, 8)


def test_samples_are_added_to_a_store():
    model, x = net(), randn(50, 6)
    gram = Gram(dtype=torch.float64)
    assert collect(model, x[:30], gram=gram) is gram
    collect(model, x[30:], gram=gram)
    whole = collect(model, x, dtype=torch.float64)
    torch.testing.assert_close(gram.rows("2"), whole.rows("2"))
    assert torch.equal(prints_of(gram), prints_of(whole))
    with pytest.raises(DataError, match="earlier batches had"):
        collect(nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 3)), x, gram=gram)


def test_differently_shuffled_loaders_are_refused():
    data = TensorDataset(randn(40, 6), torch.zeros(40))

    def gram(model, shuffle, seed):
        generator = torch.Generator().manual_seed(seed)
        return collect(model, DataLoader(data, 16, shuffle=shuffle, generator=generator))

    a, b = net(1), net(2)
    joined = Gram.join({"a": gram(a, True, 7), "b": gram(b, True, 7)})
    assert joined.names[0] == "a.0"
    with pytest.raises(DataError, match=r"sample \d is .*shuffle=False"):
        Gram.join({"a": gram(a, True, 7), "b": gram(b, True, 8)})
    with pytest.raises(DataError, match="saw different samples"):
        Gram.join({"a": gram(a, False, 0), "b": gram(b, True, 0)})
    swapped = list(data.tensors[0].split(20))[::-1]
    with pytest.raises(DataError, match="saw different samples"):
        Gram.join({"a": collect(a, data.tensors[0]), "b": collect(b, swapped)})
    unknown = collect(b, swapped, identify=False)
    assert unknown.samples is None
    Gram.join({"a": collect(a, data.tensors[0]), "b": unknown})


def test_batch_size_and_targets_do_not_show_in_the_identities_but_a_subsample_does():
    model, x = net(), randn(40, 6)

    def prints(data, **options):
        return prints_of(collect(model, data, **options))

    whole = prints(x)
    assert torch.equal(prints(list(x.split(7))), whole)
    assert torch.equal(prints((x, torch.ones(40))), whole)
    assert torch.equal(prints(x.double().float()), whole)
    assert torch.equal(prints(x, positions="features"), whole)
    drawn = prints(x, subsample=0.5, seed=1)
    assert torch.equal(prints(x, subsample=0.5, seed=1), drawn)
    for other in (prints(x, subsample=0.5, seed=2), prints(list(x.split(20)), subsample=0.5, seed=1), whole):
        assert not torch.equal(drawn, other)


def test_errors_name_the_layer():
    with pytest.raises(LayerNotFoundError, match="no layer 'fc'"):
        collect(net(), randn(4, 6), layers=["fc"])
    with pytest.raises(LayerNotFoundError, match="Sequential: no layer with samples x units ran"):
        collect(nn.Sequential(nn.Identity()), randn(4, 6))
    broken = net()
    with torch.no_grad():
        broken.get_parameter("2.bias")[0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"2 of shape \(4, 3\) holds NaN"):
        collect(broken, randn(4, 6))
    with pytest.raises(DataError, match="no batch"):
        collect(net(), [])


def test_progress_counts_the_batches(capsys):
    collect(net(), list(randn(30, 6).split(10)), progress=True)
    assert "collect" in (shown := capsys.readouterr().err)
    assert "0/3" in shown
    collect(net(), randn(30, 6), progress=False)
    assert capsys.readouterr().err == ""


def signed(number):
    return (number + 2**63) % 2**64 - 2**63


def identity(words):
    """What identities promises, for one input of one sample, in whole numbers of Python."""
    first, second = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
    total = 0
    for place, word in enumerate(words):
        mixed = signed((word + 1) * first)
        factor = signed((place + 1) * first)
        factor = signed((factor ^ (factor >> 29)) * second)
        total += (mixed ^ (mixed >> 32)) * ((factor ^ (factor >> 32)) | 1)
    return signed((total + 1) * second)


def test_identities_are_the_same_everywhere():
    values = [[0.0, 1.0, -2.5], [3.0, 0.25, 1e-3]]
    words = [struct.unpack("<3i", struct.pack("<3f", *row)) for row in values]
    assert identities(Batch((torch.tensor(values),))).tolist() == list(map(identity, words))
    ids = [[5, -6], [7, 2**40]]
    assert identities(Batch((), {"input_ids": torch.tensor(ids)})).tolist() == list(map(identity, ids))
    # Written down, because files hold them.
    assert identities(Batch((torch.tensor([[5, 6]]),))).tolist() == [identity([5, 6])] == [-5638139356555999633]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(2,), (5,), (1, 2, 3), (3, 4)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.uint8, torch.int64, torch.bool, torch.complex64]),
    seed=st.integers(0, 2**16),
)
def test_identities_tell_contents_and_their_places_apart(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(6, *shape, generator=generator) * 3).to(dtype)
    found = identities(Batch((x,)))
    assert (found.dtype, found.shape) == (torch.int64, (6,))
    rows = [tuple(row.flatten().tolist()) for row in x]
    for i in range(6):
        for j in range(6):
            assert (found[i] == found[j]) == (rows[i] == rows[j])
    order = torch.randperm(6, generator=generator)
    assert torch.equal(identities(Batch((x[order],))), found[order])
    assert torch.equal(identities(Batch((x.flip(0),))), found.flip(0))


def test_identities_see_every_single_bit():
    x = torch.zeros(1, 8)
    base = identities(Batch((x,)))
    seen = {int(base)}
    for place in range(8):
        for bit in range(31):
            bits = torch.zeros(1, 8, dtype=torch.int32)
            bits[0, place] = 1 << bit
            seen.add(int(identities(Batch((bits.view(torch.float32),)))))
    assert len(seen) == 1 + 8 * 31
    assert identities(Batch((-x,))) == base
    assert identities(Batch((torch.zeros(1, 9),))) != base


def test_identities_of_many_images_are_all_different():
    images = torch.randint(0, 2, (20_000, 5, 5), generator=torch.Generator().manual_seed(0)).float().unique(dim=0)
    assert len(identities(Batch((images,))).unique()) == len(images)


def test_several_inputs_count_each_in_its_place():
    x, y = randn(4, 3), randn(4, 3, seed=1)
    both = identities(Batch((), {"a": x, "b": y}))
    assert torch.equal(identities(Batch((), {"b": y, "a": x})), both)
    assert torch.equal(identities(Batch((x, y))), both)
    assert not (identities(Batch((y, x))) == both).any()
    beside = Batch((x, torch.tensor(3.0), torch.ones(7, 2)), {"flag": True})
    assert torch.equal(identities(beside), identities(Batch((x,))))
    with pytest.raises(DataError, match="identify=False"):
        identities(Batch((), {"a": x}), without=["a"])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    fill=st.integers(-5, 5),
    inner=st.sampled_from([(), (2,)]),
)
def test_padding_does_not_show_in_the_identities(lengths, left, right, fill, inner):
    generator = torch.Generator().manual_seed(0)
    width = max(lengths)
    ids = torch.randint(1, 9, (len(lengths), width, *inner), generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    wide = torch.full((len(lengths), left + width + right, *inner), fill)
    wide[:, left : left + width] = ids
    padded = nn.functional.pad(mask, (left, right))
    found = identities(Batch((ids,)), [mask])
    assert torch.equal(identities(Batch((wide,)), [padded]), found)
    single = [identities(Batch((ids[i : i + 1, :length],))) for i, length in enumerate(lengths)]
    assert torch.equal(torch.cat(single), found)
