from __future__ import annotations

import gc
import json
import resource
import tempfile
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from isthmus.base.errors import CheckpointError, DataError, LayerNotFoundError, NotFiniteError, OutputError
from isthmus.metrics.gram import Gram

UNITS = {"x": 3, "y": 5}


def draw(n, seed=0, offset=0.0, dtype: type[np.floating] = np.float64):
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_normal((n, p)) + offset).astype(dtype) for name, p in UNITS.items()}


def stream(arrays, cuts=(), samples=False, **keywords):
    gram = Gram(**keywords)
    for start, stop in pairwise([0, *cuts, len(arrays["x"])]):
        batch = {name: torch.from_numpy(array[start:stop]) for name, array in arrays.items()}
        gram.update(batch, samples=range(start, stop) if samples else None)
    return gram


def centred(array):
    whole = array.astype(np.longdouble)
    return (whole - whole.mean(0)).astype(np.float64)


def assert_same_rows(first, second):
    assert first.names == second.names
    for name in first.names:
        assert torch.equal(first.rows(name), second.rows(name))
        assert torch.equal(first.mean(name), second.mean(name))


splits = st.integers(2, 60).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n - 1), unique=True, max_size=8).map(sorted))
)


@settings(max_examples=40, deadline=None)
@given(split=splits, seed=st.integers(0, 2**20), offset=st.sampled_from([0.0, -30.0, 1e3, 1e6]))
def test_any_split_into_batches_gives_centred_rows(split, seed, offset):
    n, cuts = split
    arrays = draw(n, seed, offset)
    gram = stream(arrays, cuts, dtype=torch.float64)
    for name, array in arrays.items():
        assert gram.count(name) == n
        assert gram.units(name) == UNITS[name]
        assert gram.rows(name).dtype == torch.float64
        np.testing.assert_allclose(gram.mean(name), array.mean(0), rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(gram.rows(name), centred(array), atol=1e-9 if offset == 1e6 else 1e-12)


@pytest.mark.parametrize("offset", [0, 1, 10, 100, 1000])
def test_a_large_offset_costs_no_digits(offset):
    arrays = draw(500, 1, offset, np.float32)
    rows = stream(arrays, [90, 300]).rows("x")
    assert rows.dtype == torch.float32
    np.testing.assert_allclose(rows, centred(arrays["x"]), atol=5e-7)


@settings(max_examples=25, deadline=None)
@given(split=splits, data=st.data(), max_bytes=st.sampled_from([0, 200, 1000, 10**6]))
def test_any_piece_spilled_or_not_is_a_piece_of_the_whole(split, data, max_bytes):
    n, cuts = split
    gram, whole = stream(draw(n), cuts, max_bytes=max_bytes), stream(draw(n), cuts)
    assert gram.nbytes == n * 4 * sum(UNITS.values())
    assert gram.nbytes - gram.spilled <= max_bytes
    start = data.draw(st.integers(0, n + 2))
    stop = data.draw(st.none() | st.integers(-2, n + 2))
    for name in UNITS:
        assert torch.equal(gram.rows(name, start, stop), whole.rows(name)[start:stop])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-6), (torch.float64, 0)]
)
def test_storage_types_agree_in_memory_and_in_a_file(dtype, tolerance):
    arrays = draw(40, 2, 100.0)
    held, spilled = stream(arrays, [7], dtype=dtype), stream(arrays, [7], dtype=dtype, max_bytes=0)
    assert held.nbytes == spilled.spilled == 40 * 8 * dtype.itemsize
    assert held.spilled == 0
    assert_same_rows(held, spilled)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert held.rows("x").dtype == expected
    assert held.rows("x", dtype=torch.float16).dtype == torch.float16
    np.testing.assert_allclose(held.rows("x", dtype=torch.float64), centred(arrays["x"]), atol=tolerance + 1e-12)


@pytest.mark.parametrize("value", [0.1, -1e9, 3e-7])
def test_a_constant_unit_is_exactly_zero(value):
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = value
    parts = [Gram(), Gram()]
    for gram, part in zip(parts, (x[:20], x[20:]), strict=True):
        for batch in part.split(7):
            gram.update({"x": batch})
    whole = parts[0].merge(parts[1])
    assert not whole.rows("x")[:, 1].any()
    assert whole.rows("x")[:, 0].std() > 0.5


def test_layers_may_differ_in_their_number_of_samples():
    gram = Gram()
    for _ in range(3):
        gram.update({"conv": torch.ones(8, 2), "fc": torch.ones(2, 4)})
    assert (gram.count("conv"), gram.count("fc")) == (24, 6)
    assert gram.rows("conv", 5, 20).shape == (15, 2)


def test_the_layers_of_later_batches_may_come_in_any_order():
    x = draw(6)
    gram = stream(x)
    gram.update({name: torch.from_numpy(x[name]) for name in ("y", "x")})
    assert gram.names == ("x", "y")
    assert gram.count("x") == 12


# --- refused batches


def bad_batches():
    x, y = torch.ones(4, 3), torch.ones(4, 5)
    return {
        "no layer": ({}, None, DataError, "expected x, y, the same in every batch"),
        "a layer is missing": ({"x": x}, None, DataError, "the batch holds the layers x; expected x, y"),
        "other units": ({"x": x, "y": x}, None, DataError, "'y' has 3 units .* earlier batches had 5"),
        "three axes": ({"x": x, "y": torch.ones(4, 5, 2)}, None, DataError, r"'y' has shape \(4, 5, 2\)"),
        "empty": ({"x": x, "y": torch.ones(0, 5)}, None, DataError, "not empty"),
        "integers": ({"x": x, "y": y.long()}, None, DataError, "'y' .* torch.int64; expected floating point"),
        "another device": ({"x": x, "y": y.to("meta")}, None, DataError, "'y' is on meta"),
        "NaN": ({"x": x, "y": y * float("nan")}, None, NotFiniteError, r"'y' of shape \(4, 5\) holds NaN"),
        "infinity": ({"x": x, "y": y * float("inf")}, None, NotFiniteError, "'y'"),
        "overflow": ({"x": x, "y": y.double() * 1e60}, None, NotFiniteError, "overflow torch.float32"),
        "samples": ({"x": x, "y": y}, [1, 2, 3, 4], DataError, "with samples, earlier ones without"),
    }


@pytest.mark.parametrize("max_bytes", [0, 150, 1 << 20])
@pytest.mark.parametrize("case", bad_batches())
def test_a_refused_batch_changes_nothing(case, max_bytes):
    batch, samples, error, message = bad_batches()[case]
    gram = stream(draw(9), [4], max_bytes=max_bytes)
    before = {name: gram.rows(name) for name in UNITS}
    held, size = gram._held, gram.spilled
    with pytest.raises(error, match=message):
        gram.update(batch, samples=samples)
    assert (gram._held, gram.spilled) == (held, size)
    for name, rows in before.items():
        assert torch.equal(gram.rows(name), rows)
    more = draw(5, 3)
    gram.update({name: torch.from_numpy(array) for name, array in more.items()})
    both = {name: np.concatenate([array, more[name]]) for name, array in draw(9).items()}
    assert_same_rows(gram, stream(both, [4, 9]))


def test_bad_arguments():
    with pytest.raises(DataError, match=r"dtype is torch.int64; expected one of torch.float64"):
        Gram(dtype=torch.int64)
    with pytest.raises(DataError, match="max_bytes is -1"):
        Gram(max_bytes=-1)
    with pytest.raises(DataError, match="at least one"):
        Gram().update({})
    with pytest.raises(LayerNotFoundError, match="no batch has been added yet"):
        Gram().rows("x")
    gram = stream(draw(3))
    for read in (gram.rows, gram.count, gram.units, gram.mean):
        with pytest.raises(LayerNotFoundError, match=r"no samples of layer 'xx'; did you mean x\?"):
            read("xx")


def test_repr():
    assert repr(Gram()) == "Gram(no samples; 0 bytes, 0 of them in a file)"
    assert repr(stream(draw(3), max_bytes=40)) == "Gram(x: 3 x 3, y: 3 x 5; 96 bytes, 60 of them in a file)"


# --- the temporary file


def test_the_temporary_file_is_gone_with_the_store(tmp_path):
    gram = stream(draw(50), [20], max_bytes=0, folder=tmp_path)
    joined = Gram.join({"a": gram})
    spill = gram._spill
    assert spill is not None
    file = spill._file
    rows = gram.rows("x")
    del gram, spill
    gc.collect()
    assert not file.closed, "the joined store still reads it"
    assert torch.equal(joined.rows("a.x"), rows)
    del joined
    gc.collect()
    assert file.closed
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path):
    gram = Gram(max_bytes=0, folder=tmp_path / "none")
    with pytest.raises(OutputError, match=r"none: No such file.*choose a folder with more room, Gram\(folder"):
        gram.update({"x": torch.ones(2, 2)})
    assert gram.names == ()


@contextmanager
def small_files():
    """No file may grow beyond 4,000 bytes, as on a full disk; only inside, since the test report may be a file too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    gram = stream(draw(50), max_bytes=0, folder=tmp_path)
    rows = gram.rows("y")
    batch = {name: torch.from_numpy(array) for name, array in draw(110).items()}
    with small_files(), pytest.raises(OutputError, match=f"temporary file of {tmp_path}"):
        gram.update(batch)
    with small_files(), pytest.raises(OutputError, match="temporary file"):
        gram.merge(stream(draw(110)))
    with small_files(), pytest.raises(OutputError, match="cannot write"):
        stream(draw(200)).save(tmp_path / "gram")
    assert torch.equal(gram.rows("y"), rows)
    assert gram.spilled == 50 * 32
    assert list(tmp_path.iterdir()) == []
    gram.update({name: torch.from_numpy(array) for name, array in draw(20, 4).items()})
    assert gram.count("y") == 70


def test_a_temporary_file_that_was_cut_off():
    gram = stream(draw(50), max_bytes=0)
    assert gram._spill is not None
    gram._spill._file.truncate(100)
    with pytest.raises(OutputError, match="the file is shorter than it was"):
        gram.rows("y")


def test_files_of_more_than_one_write(monkeypatch):
    """A system may write or read less than it was asked to."""
    real = tempfile.TemporaryFile

    class Short:
        def __init__(self, **keywords):
            self.file = real(**keywords)
            self.close, self.seek, self.truncate = self.file.close, self.file.seek, self.file.truncate

        def write(self, view):
            return self.file.write(view[:17])

        def readinto(self, view):
            return self.file.readinto(view[:13])

    monkeypatch.setattr(tempfile, "TemporaryFile", Short)
    assert_same_rows(stream(draw(20), [3], max_bytes=0), stream(draw(20), [3]))


# --- merging and joining


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), sizes=st.tuples(*[st.integers(1, 20)] * 3), offset=st.sampled_from([0.0, 1e6]))
def test_merging_is_associative_and_keeps_the_order(seed, sizes, offset):
    arrays = draw(sum(sizes), seed, offset)
    edges = np.cumsum([0, *sizes])

    def part(i, max_bytes=1 << 20):
        piece = {name: array[edges[i] : edges[i + 1]] for name, array in arrays.items()}
        gram = Gram(dtype=torch.float64, max_bytes=max_bytes)
        gram.update({name: torch.from_numpy(array) for name, array in piece.items()}, samples=range(*edges[i : i + 2]))
        return gram

    for merged in (part(0).merge(part(1)).merge(part(2)), part(0, 0).merge(part(1).merge(part(2, 0)))):
        assert merged.samples is not None
        assert merged.samples.tolist() == list(range(sum(sizes)))
        for name, array in arrays.items():
            np.testing.assert_allclose(merged.rows(name), centred(array), atol=1e-8 if offset else 1e-12)


def test_merging_with_an_empty_store_and_with_itself():
    gram = stream(draw(5), samples=True)
    assert_same_rows(Gram().merge(gram), gram)
    assert gram.merge(Gram()) is gram
    rows = gram.rows("x")
    assert torch.equal(gram.merge(gram).rows("x"), torch.cat([rows, rows]))
    assert gram.samples is not None
    assert gram.samples.tolist() == [0, 1, 2, 3, 4] * 2


def test_merging_respects_the_bound_on_memory_and_the_type():
    merged = stream(draw(10), max_bytes=400).merge(stream(draw(10), dtype=torch.float64))
    assert merged.nbytes == 20 * 8 * 4
    assert merged.nbytes - merged.spilled <= 400


def test_what_cannot_be_merged():
    gram = stream(draw(5))
    other = Gram()
    other.update({"x": torch.ones(2, 3), "y": torch.ones(2, 6)})
    with pytest.raises(DataError, match=r"other layers \(units by name\): \{'x': 3, 'y': 5\} and \{'x': 3, 'y': 6\}"):
        gram.merge(other)
    with pytest.raises(DataError, match="only one of the two stores has fingerprints"):
        gram.merge(stream(draw(5), samples=True))
    with pytest.raises(DataError, match="layer 'x' is on cpu and meta"):
        gram.merge(stream(draw(5)).to("meta"))
    with pytest.raises(DataError, match="'x' has 2 units; earlier batches had 3"):
        gram._append("x", torch.ones(1, 2), torch.zeros(2, dtype=torch.float64))
    assert gram.count("x") == 5


def test_joining_shares_rows_and_is_a_snapshot():
    a, b = stream(draw(6), samples=True), stream(draw(6, 1), samples=True, max_bytes=0)
    a.convention, b.convention = {"positions": "mean", "mask": None}, {"positions": "mean", "mask": "m"}
    joined = Gram.join({"a": a, "b": b})
    assert joined.names == ("a.x", "a.y", "b.x", "b.y")
    assert joined.convention == {"positions": "mean"}
    assert joined.samples is not None
    assert torch.equal(joined.samples, torch.arange(6))
    assert joined._layers["a.x"].blocks[0].rows is a._layers["x"].blocks[0].rows
    assert torch.equal(joined.rows("b.y"), b.rows("y"))
    a.update({"x": torch.ones(2, 3), "y": torch.ones(2, 5)}, samples=[6, 7])
    assert joined.count("a.x") == 6
    joined.update({name: torch.ones(1, joined.units(name)) for name in joined.names}, samples=[9])
    assert (a.count("x"), b.count("x"), joined.count("b.x")) == (8, 6, 7)


def test_joining_refuses_other_samples():
    a, b, c = stream(draw(6), samples=True), Gram(), stream(draw(5), samples=True)
    order = [0, 1, 4, 3, 2, 5]
    b.update({name: torch.from_numpy(array[order]) for name, array in draw(6).items()}, samples=order)
    message = r"'a' and 'b' saw .*: sample 2 is 2 in one and 4 in the other, 2 of 6 differ.*shuffle=False"
    with pytest.raises(DataError, match=message):
        Gram.join({"a": a, "b": b})
    with pytest.raises(DataError, match="'a' has seen 6 samples, 'c' 5"):
        Gram.join({"a": a, "c": c})
    assert Gram.join({"a": a, "b": stream(draw(9))}).samples is not None
    assert Gram.join({"a": stream(draw(9))}).samples is None


def test_what_cannot_be_joined():
    with pytest.raises(DataError, match="nothing to join"):
        Gram.join({})
    dotted, plain = Gram(), Gram()
    dotted.update({"b.c": torch.ones(2, 2)})
    plain.update({"c": torch.ones(2, 2)})
    with pytest.raises(DataError, match=r"two layers would be named 'a\.b\.c'"):
        Gram.join({"a": dotted, "a.b": plain})


def test_blocks_give_what_a_store_is_made_of():
    gram = stream(draw(10, offset=50.0), [4], dtype=torch.float64, max_bytes=200)
    other = Gram(dtype=torch.float64)
    for name in gram.names:
        for rows, shift in gram._blocks(name):
            other._append(name, rows, shift)
    assert_same_rows(other, gram)
    assert [len(rows) for rows, _ in gram._blocks("x")] == [4, 6]


def test_the_peak_bounds_every_centred_row():
    gram = stream(draw(30, 5, 10.0), [9, 20], dtype=torch.float64).merge(stream(draw(8, 6, -10.0), dtype=torch.float64))
    for name in UNITS:
        largest = float(gram.rows(name).abs().max())
        assert largest <= gram._peak(name) <= 3 * largest


def test_moving_to_a_device():
    gram = stream(draw(5), [2])
    assert gram.to("cpu") is gram
    layer = gram.to("meta")._layers["x"]
    assert {block.read().device.type for block in layer.blocks} == {"meta"}
    assert len({id(block.shift) for block in layer.blocks}) == 1


def test_state_that_is_born_in_inference_mode_lives_outside():
    gram = Gram()
    with torch.inference_mode():
        gram.update({"x": torch.ones(3, 2)})
        gram.rows("x")
    gram.update({"x": torch.ones(2, 2, requires_grad=True)})
    assert not gram.rows("x").requires_grad
    gram.rows("x").add_(1)


# --- files


@pytest.mark.parametrize("max_bytes", [0, 100, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_saving_and_loading_keep_every_bit(tmp_path, dtype, max_bytes):
    gram = stream(draw(20, 0, 40.0), [6, 7], samples=True, dtype=dtype, max_bytes=max_bytes)
    gram.merge(stream(draw(5), samples=True, dtype=dtype))
    gram.convention = {"positions": "mean"}
    path = gram.save(tmp_path / "gram.safetensors")
    loaded = Gram.load(path, max_bytes=max_bytes)
    assert_same_rows(loaded, gram)
    assert loaded.dtype == dtype
    assert loaded.convention == gram.convention
    assert loaded.samples is not None
    assert torch.equal(loaded.samples, torch.tensor([*range(20), *range(5)]))
    assert loaded.nbytes - loaded.spilled <= max_bytes
    assert load_file(path)["rows.0"].shape == (25, 3), "any reader of safetensors reads it"
    loaded.update({"x": torch.ones(1, 3), "y": torch.ones(1, 5)}, samples=[99])


def test_loading_piece_by_piece(tmp_path, monkeypatch):
    gram = stream(draw(20), [6])
    path = gram.save(tmp_path / "gram")
    monkeypatch.setattr("isthmus.metrics.gram_file._PIECE", 100)
    loaded = Gram.load(path)
    assert len(loaded._layers["x"].blocks) == 5
    assert_same_rows(loaded, gram)


def test_an_empty_store_is_a_file_as_well(tmp_path):
    loaded = Gram.load(Gram(dtype=torch.float16).save(tmp_path / "gram"))
    assert loaded.names == ()
    assert loaded.samples is None
    assert loaded.dtype == torch.float16


def test_files_that_are_no_stores(tmp_path):
    path = stream(draw(20)).save(tmp_path / "gram")
    whole = path.read_bytes()
    with pytest.raises(CheckpointError, match="No such file"):
        Gram.load(tmp_path / "none")
    (tmp_path / "cut").write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="not a whole file"):
        Gram.load(tmp_path / "cut")
    save_file({"x": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"was not written by Gram\.save"):
        Gram.load(tmp_path / "other")


def test_a_file_whose_parts_do_not_fit(tmp_path):
    tensors = load_file(stream(draw(20)).save(tmp_path / "gram"))
    content = {"dtype": "float32", "convention": {}, "layers": [{"name": "x", "runs": [20]}]}

    def load(change, **layer):
        changed = {**content, "layers": [{**content["layers"][0], **layer}]}
        metadata = {"isthmus": json.dumps({"format": "isthmus.gram.1", "content": changed})}
        save_file({**tensors, **change}, tmp_path / "bad", metadata=metadata)
        return Gram.load(tmp_path / "bad")

    assert load({}).count("x") == 20
    for change, layer in (
        ({}, {"runs": [19]}),
        ({"shift.0": torch.zeros(1, 4, dtype=torch.float64)}, {}),
        ({"rows.0": torch.full((20, 3), torch.nan)}, {}),
        ({}, {"name": 3, "runs": None}),
    ):
        with pytest.raises(CheckpointError, match="not a whole file"):
            load(change, **layer)


def test_a_file_that_cannot_be_spilled(tmp_path):
    path = stream(draw(20)).save(tmp_path / "gram")
    with pytest.raises(OutputError, match="temporary file"):
        Gram.load(path, max_bytes=0, folder=Path("/nonexistent"))
