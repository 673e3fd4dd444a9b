from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isthmus.base.batches import Batch, as_batch, batches
from isthmus.base.errors import DataError, LayerNotFoundError
from isthmus.metrics.reading import batch_count, one_side, reader, two_sides

CPU = torch.device("cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make, seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make()


def read_all(model, data, layers=None, **options):
    """Rows of all batches, and the reader."""
    found = {}
    with reader([one_side(model, layers)], **options) as read:
        for batch in batches(data):
            for name, rows in read(batch).items():
                found.setdefault(name, []).append(rows)
    return {name: torch.cat(rows) for name, rows in found.items()}, read


class Tokens(nn.Module):
    """Embeds tokens, adds positions, mixes nothing between tokens, pools, and scores pairs of tokens."""

    def __init__(self, units=5, heads=2):
        super().__init__()
        self.embed, self.places = nn.Embedding(20, units), nn.Embedding(30, units)
        self.norm, self.scores, self.pool = nn.LayerNorm(units), nn.Identity(), nn.Linear(units, 3)
        self.heads, self.pairs = heads, nn.Softmax(-1)

    def forward(self, input_ids, attention_mask=None, **_):
        x = self.norm(self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1])[None]))
        self.pairs(torch.stack([x @ x.mT] * self.heads, 1))
        self.scores(x[:, 0])
        return self.pool(x[:, 0])


def token_batch(lengths, padding=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + padding
    ids = torch.randint(1, 20, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


class Around(nn.Module):
    """Calls one part once, whatever that gives."""

    def __init__(self, part):
        super().__init__()
        self.part, self.head = part, nn.Linear(3, 2)

    def forward(self, x):
        self.part(x)
        return self.head(x)


def test_the_fixture_is_as_planned():
    found, _ = read_all(seeded(Tokens), [token_batch([3, 2])], mask=None)
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {
        "embed": (6, 5),
        "norm": (6, 5),
        "pairs": (18, 2),
        "pool": (2, 3),
    }


def test_first_axes_that_are_not_of_samples_are_left_out_unless_named():
    model, batch = seeded(Tokens), token_batch([3, 2, 3])
    assert "places" not in read_all(model, [batch])[0]
    places = read_all(model, [batch], ["places"])[0]["places"]
    assert torch.equal(places, model.places.weight[:3].detach())


def test_a_layer_that_fits_the_first_batch_only_by_chance_is_told_later():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.linear = nn.Embedding(9, 4), nn.Linear(3, 4)

        def forward(self, x):
            self.table(torch.arange(x.shape[1])[:, None].expand(-1, 2))
            return self.linear(x)

    model = Table()
    data = [randn(6, 6, 3), randn(5, 6, 3)]
    with pytest.raises(DataError, match=r"batch 1: table has shape \(6, 2, 4\) for 5 samples.*without this one"):
        read_all(model, data)
    assert set(read_all(model, data[::-1])[0]) == {"linear"}


def test_layers_of_the_first_batch_are_read_in_every_one():
    class Deepening(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.more, self.calls = nn.Linear(3, 3), nn.Linear(3, 3), 0

        def forward(self, x):
            self.calls += 1
            return self.linear(x) if self.calls == 2 else self.more(self.linear(x))

    with pytest.raises(LayerNotFoundError, match="'more' exists but was not called"):
        read_all(Deepening(), [randn(4, 3)] * 2)


def test_a_network_without_readable_layers_is_refused():
    with pytest.raises(LayerNotFoundError, match="Around: no layer with samples x units ran; name some"):
        read_all(Around(Returns(lambda x: x)), randn(4, 3), [])
    with pytest.raises(LayerNotFoundError, match="Sequential: no layer with samples x units ran"):
        read_all(nn.Sequential(Returns(lambda x: x.sum())), randn(4, 3))


def test_labels_are_in_execution_order():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.relu, self.first = nn.Linear(4, 2), nn.ReLU(inplace=True), nn.Linear(3, 4)

        def forward(self, x):
            return self.relu(self.last(self.relu(self.first(x))))

    model, x = seeded(Backwards), randn(5, 3)
    found, read = read_all(model, x)
    assert read.layers == (("first", "relu", "last", "relu#2"),)
    with torch.no_grad():
        first = model.first(x)
        last = model.last(first.clamp(min=0))
    for rows, truth in zip(found.values(), (first, first.clamp(min=0), last, last.clamp(min=0)), strict=True):
        torch.testing.assert_close(rows, truth)
    assert read_all(model, x, ["relu#2", "first"])[1].layers == (("first", "relu#2"),)


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (lambda x: (x + 1, x.new_ones(len(x), 2, 4, 4)), "part[0]"),
        (lambda x: {"loss": x.sum(), "hidden": x + 1, "other": x}, "part[hidden]"),
        (lambda x: OrderedDict(ids=x.long(), nested={"a": [None, x + 1], "b": x}), "part[nested][a][1]"),
        (lambda x: [None, "text", (x + 1, None)], "part[2][0]"),
    ],
)
def test_of_several_outputs_the_first_with_samples_and_units_is_read(make, first):
    model, x = Around(Returns(make)), randn(4, 3)
    for layers in (None, ["part"]):
        found, _ = read_all(model, x, layers)
        assert [name for name in found if name != "head"] == [first]
        assert torch.equal(found[first], x + 1)


def test_each_call_gives_its_own_first_output():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Returns(lambda x: (x, x - 1))

        def forward(self, x):
            return self.part(self.part(x)[1])[1]

    x = randn(4, 3)
    found, _ = read_all(Twice(), x)
    assert list(found) == ["part[0]", "part#2[0]"]
    assert torch.equal(found["part#2[0]"], x - 1)
    found, _ = read_all(Twice(), x, ["", "part[1]"])
    assert list(found) == ["part[1]", ""]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: None, "'part' gave no tensor but None"),
        (lambda x: ("text", 3), "'part' gave no tensor but a tuple of str, int"),
        (lambda x: object(), "'part' gave no tensor but a object"),
    ],
)
def test_a_wanted_layer_without_a_tensor_is_an_error_and_left_out_by_default(make, message):
    model = Around(Returns(make))
    with pytest.raises(LayerNotFoundError, match=message):
        read_all(model, randn(4, 3), ["head", "part"])
    assert set(read_all(model, randn(4, 3))[0]) == {"head"}


def test_a_wanted_layer_of_integers_is_an_error():
    model = Around(Returns(lambda x: x.argmax(1, keepdim=True)))
    with pytest.raises(DataError, match=r"part of shape \(4, 1\) is torch.int64"):
        read_all(model, randn(4, 3), ["part"])
    with pytest.raises(LayerNotFoundError, match=r"several outputs; name one of part\[1\]\[0\], part\[1\]\[1\]"):
        read_all(Around(Returns(lambda x: (x, [x, x]))), randn(4, 3), ["part[1]"])


def test_two_sides_tell_their_layers_apart_and_one_model_runs_once():
    a, b = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Sequential(nn.Linear(3, 5))
    with reader(two_sides(a, b, None, CPU)) as read:
        found = read(Batch((randn(6, 3),)))
    assert list(found) == ["model_a.0", "model_a.1", "model_b.0"]
    assert read.names == (("model_a.0", "model_a.1"), ("model_b.0",))
    assert read.layers == (("0", "1"), ("0",))
    calls = []
    a.register_forward_pre_hook(lambda *_: calls.append(1))
    with reader(two_sides(a, a, (["0"], ["0", "1"]), CPU)) as read:
        assert list(read(Batch((randn(6, 3),)))) == ["0", "1"]
    assert (read.names, calls) == ((("0",), ("0", "1")), [1])


def test_number_of_batches():
    assert batch_count([1, 2, 3]) == 3
    assert batch_count(iter(())) is None
    assert batch_count(randn(5, 2)) is None
    assert batch_count({"x": randn(5, 2)}) is None


def test_networks_and_settings_come_back_as_they_were():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    before = torch.backends.mha.get_fastpath_enabled()
    inside = []
    model.register_forward_pre_hook(lambda *_: inside.append(torch.backends.mha.get_fastpath_enabled()))
    with pytest.raises(RuntimeError), reader([one_side(model)]) as read:
        read(Batch((randn(2, 4),)))
    assert inside == [False]
    assert model.training
    assert model[1].training
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 1


def test_padding_is_left_out_of_token_layers_alone():
    model, batch = seeded(Tokens), token_batch([3, 1, 4], padding=1)
    found, read = read_all(model, [batch])
    every, _ = read_all(model, [batch], mask=None)
    kept = batch["attention_mask"].bool().flatten()
    for name in ("embed", "norm"):
        assert torch.equal(found[name], every[name][kept])
    for name in ("pairs", "pool"):  # (N, heads, tokens, tokens) and (N, units)
        assert torch.equal(found[name], every[name])
    assert read.convention == {"positions": "samples", "mask": "attention_mask", "subsample": None}


def test_means_are_of_real_tokens():
    model, batch = seeded(Tokens), token_batch([3, 1, 4], padding=1)
    found, _ = read_all(model, [batch], ["norm"], positions="mean")
    rows, _ = read_all(model, [batch], ["norm"])
    truth = torch.stack([part.mean(0) for part in rows["norm"].split([3, 1, 4])])
    torch.testing.assert_close(found["norm"], truth)


def test_masked_tokens_cannot_be_features():
    model = seeded(Tokens)
    with pytest.raises(DataError, match=r"norm of shape .* has 2 masked.*positions='samples' or positions='mean'"):
        read_all(model, [token_batch([2, 4])], ["norm"], positions="features")
    whole, read = read_all(model, [token_batch([4, 4])], ["norm"], positions="features")
    assert whole["norm"].shape == (2, 20)
    assert read.convention["mask"] == "attention_mask"
    read_all(model, [token_batch([2, 4])], ["pool"], positions="features")


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 5), max_size=3),
    paddings=st.lists(st.integers(0, 4), min_size=4, max_size=4),
    positions=st.sampled_from(["samples", "mean"]),
)
def test_the_length_of_the_padding_does_not_show(lengths, cuts, paddings, positions):
    model = seeded(Tokens).double()
    whole = token_batch(lengths)
    edges = [0, *sorted({cut for cut in cuts if cut < len(lengths)}), len(lengths)]
    parts = []
    for (start, stop), padding in zip(pairwise(edges), paddings, strict=False):
        width = max(lengths[start:stop])
        part = {key: value[start:stop, :width] for key, value in whole.items()}
        parts.append({key: nn.functional.pad(value, (0, padding)) for key, value in part.items()})
    layers = ["embed", "norm", "pool"]
    padded, _ = read_all(model, parts, layers, positions=positions)
    plain, _ = read_all(model, [whole], layers, positions=positions)
    for name, rows in plain.items():
        torch.testing.assert_close(padded[name], rows, rtol=0, atol=1e-14)


def test_a_mask_is_by_name_for_all_or_for_parts():
    model = nn.ModuleDict({"left": nn.Linear(3, 4), "right": nn.Linear(3, 4), "rest": nn.Linear(3, 4)})

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x, keep, other):
            return [part(x) for part in self.parts.values()]

    keep, other = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[True, False, False], [True, False, False]])
    data = [{"x": randn(2, 3, 3), "keep": keep, "other": other}]
    counts = {name: len(rows) for name, rows in read_all(Both(), data, mask="keep")[0].items()}
    assert set(counts.values()) == {3}
    parts = {"parts": "keep", "parts.right": "other"}
    found, read = read_all(Both(), data, mask=parts)
    assert [len(rows) for rows in found.values()] == [3, 2, 3]
    assert read.convention["mask"] == parts
    assert [len(rows) for rows in read_all(Both(), data, mask={"parts.left": "keep"})[0].values()] == [3, 6, 6]
    with pytest.raises(
        LayerNotFoundError, match=r"mask names 'parts\.rigth', which no network has; did you mean parts"
    ):
        read_all(Both(), data, mask={"parts.rigth": "keep"})


def test_a_missing_mask_is_refused_by_any_other_name_before_the_network_runs():
    model = seeded(Tokens)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = token_batch([2, 3])
    with pytest.raises(DataError, match="batch 0 has no mask 'attention_maks'; did you mean attention_mask"):
        read_all(model, [batch], mask="attention_maks")
    with pytest.raises(DataError, match="batch 0 has no mask 'attention'"):
        read_all(nn.Sequential(nn.Linear(3, 2)), randn(4, 3), mask="attention")
    assert not calls
    found, read = read_all(model, [{"input_ids": batch["input_ids"]}])
    assert (len(found["norm"]), read.convention["mask"]) == (6, None)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 1, 3, 3), r"batch 0: the mask 'attention_mask' has shape \(2, 1, 3, 3\).*mask=None"),
        (torch.tensor([[1, 1, 1], [0, 0, 0]]), "masks every token of sample 1: leave it out"),
        (torch.tensor([[0.0, 0.0, -1e9]] * 2), "other values than 0 and 1"),
        ("text", "has type str"),
    ],
)
def test_unreadable_masks_are_refused(mask, message):
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": mask}
    with pytest.raises(DataError, match=message):
        read_all(seeded(Tokens), [batch])
    assert len(read_all(seeded(Tokens), [batch], mask=None)[0]["norm"]) == 6


def test_an_encoder_and_a_decoder_need_a_mask_each():
    batch = token_batch([2, 3]) | {"decoder_input_ids": torch.ones(2, 3, dtype=torch.long)}
    with pytest.raises(DataError, match="'decoder_input_ids' beside the mask 'attention_mask': say whose tokens"):
        read_all(seeded(Tokens), [batch])
    assert len(read_all(seeded(Tokens), [batch], mask={"": "attention_mask"})[0]["norm"]) == 5


def test_sizes_that_agree_by_chance_in_a_later_batch_are_not_masked():
    class Latents(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.latents = nn.Embedding(20, 3), nn.Linear(3, 4)

        def forward(self, input_ids, attention_mask):
            x = self.embed(input_ids).mean(1, keepdim=True)
            return self.latents(x.expand(-1, 6, -1))

    model = seeded(Latents)
    found, _ = read_all(model, [token_batch([2, 4]), token_batch([2, 6])])
    assert (len(found["embed"]), len(found["latents"])) == (14, 24)
    with pytest.raises(DataError, match=r"latents of shape \(2, 6, 4\) has no row for each token of the mask"):
        read_all(model, [token_batch([2, 6]), token_batch([2, 4])])


def test_one_token_per_sample_does_not_make_tokens_of_samples():
    found, _ = read_all(seeded(Tokens), [token_batch([1, 1]), token_batch([2, 3])])
    assert (len(found["norm"]), len(found["pool"])) == (7, 4)


def test_padding_of_torch_transformers_is_masked_too():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.embed, self.encoder = nn.Embedding(20, 8), nn.TransformerEncoder(layer, 2)

        def forward(self, input_ids, attention_mask):
            return self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)

    model = seeded(Encoder).double()
    batch = token_batch([3, 1, 4])
    longer = {key: nn.functional.pad(value, (0, 3)) for key, value in batch.items()}
    found, _ = read_all(model, [batch])
    assert "encoder.layers.1.self_attn[0]" in found
    for name, rows in read_all(model, [longer])[0].items():
        torch.testing.assert_close(rows, found[name], rtol=0, atol=1e-12)
        assert len(rows) == 8


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    share=st.floats(0.01, 1),
    seed=st.integers(-(2**70), 2**70),
    positions=st.sampled_from(["samples", "features", "mean"]),
)
def test_a_subsample_is_the_stated_share_of_distinct_rows_of_each_batch(counts, share, seed, positions):
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 3, 2)))
    sizes = torch.arange(sum(counts) * 16.0).reshape(-1, 1, 4, 4)
    data = list(sizes.split(counts))
    options = {"positions": positions, "seed": seed}
    found, read = read_all(model, data, subsample=share, **options)
    every, _ = read_all(model, data, **options)
    assert read.convention["subsample"] == share
    assert read.convention["seed"] == seed
    places = {"0": 9, "1": 9, "2": 4} if positions == "samples" else dict.fromkeys("012", 1)
    for name, rows in found.items():
        batched = every[name].split([count * places[name] for count in counts])
        numbers = [max(1, round(share * len(whole))) for whole in batched]
        for drawn, whole in zip(rows.split(numbers), batched, strict=True):
            assert (drawn[:, None] == whole).all(2).any(1).all()
            assert len(drawn.unique(dim=0)) == min(len(drawn), len(whole.unique(dim=0))) or name != "0"
    if positions != "mean":
        assert torch.equal(found["1"], found["0"].relu())  # the same rows
    again, _ = read_all(model, data, ["2"], subsample=share, **options)
    assert torch.equal(again["2"], found["2"])  # whatever else is read


def test_a_subsample_differs_from_batch_to_batch_and_from_seed_to_seed():
    model, x = nn.Sequential(nn.Linear(3, 2)), randn(40, 3)
    data = [x, x]

    def drawn(seed):
        return read_all(model, data, subsample=0.5, seed=seed)[0]["0"]

    assert not torch.equal(drawn(0)[:20], drawn(0)[20:])
    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))
    assert len(read_all(model, data, subsample=1.0)[0]["0"]) == 80
    assert len(read_all(model, data, subsample=1e-9)[0]["0"]) == 2


def test_every_row_is_equally_likely_to_be_drawn():
    model = nn.Sequential(nn.Flatten(), nn.ReLU())
    x = torch.arange(10.0)[:, None]
    counts = torch.zeros(10)
    for seed in range(400):
        rows = read_all(model, x, ["1"], subsample=0.3, seed=seed)[0]["1"]
        counts += torch.nn.functional.one_hot(rows.flatten().long(), 10).sum(0)
    # binomial with 400 draws of 0.3: a standard deviation of 9.2
    assert counts.sum() == 1200
    assert ((counts - 120).abs() < 4 * 9.2).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"subsample": 0}, DataError, "subsample is 0; expected the share of rows to keep, above 0 and at most 1"),
        ({"subsample": 1.5}, DataError, "subsample is 1.5"),
        ({"subsample": float("nan")}, DataError, "subsample is nan"),
        ({"subsample": True}, DataError, "subsample is True"),
        ({"subsample": "half"}, DataError, "subsample is 'half'"),
        ({"seed": 0.5}, DataError, "seed is 0.5; expected an integer"),
        ({"seed": True}, DataError, "seed is True"),
        ({"mask": 3}, DataError, "mask is 3; expected the name of an input"),
        ({"mask": {"0": None, "1": 3}}, DataError, "expected the name of an input"),
        ({"positions": "rows"}, DataError, "unknown positions 'rows'"),
    ],
)
def test_bad_options_are_refused_before_a_hook_is_set(options, error, message):
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    with pytest.raises(error, match=message), reader([one_side(model)], **options):
        pass
    assert not any(module._forward_hooks for module in model.modules())


def test_as_batch_of_a_mapping_keeps_the_mask_as_an_input():
    assert set(as_batch(token_batch([2, 1])).kwargs) == {"input_ids", "attention_mask"}
