"""Files: whole or not at all, and read without running anything."""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from isthmus.base.errors import CheckpointError, OutputError
from isthmus.base.files import load_state_dict, make_folder, save_state_dict, sha256, write_atomic

FORMATS = pytest.mark.parametrize("name", ["net.safetensors", "net.pt", "net.bin", "net"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Writing


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    assert write_atomic(path, lambda temporary: temporary.write_text("one")) == path
    write_atomic(str(path), lambda temporary: temporary.write_text("two"))
    assert path.read_text() == "two"
    assert names(tmp_path) == ["a.txt"]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent

    write_atomic(path, write)
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interruption_leaves_the_old_file_and_nothing_else(error: type[BaseException], tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error("stop")

    with pytest.raises(error):
        write_atomic(tmp_path / "none.txt", write)
    assert names(tmp_path) == []
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error):
        write_atomic(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    def write(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"cannot write .*a\.txt: .*No space left"):
        write_atomic(tmp_path / "a.txt", write)
    assert names(tmp_path) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    called = []
    with pytest.raises(OutputError, match=r"cannot write .*none/a\.txt: No such file or directory \(folder .*none\)"):
        write_atomic(tmp_path / "none" / "a.txt", called.append)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Not a directory"):
        write_atomic(tmp_path / "file" / "a.txt", called.append)
    assert called == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_write_protected_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        write_atomic(tmp_path / "a.txt", lambda temporary: temporary.write_text(""))


def test_a_folder_in_the_place_of_the_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_atomic(tmp_path / "a", lambda temporary: temporary.write_text(""))
    assert names(tmp_path) == ["a"]


def test_a_result_has_the_rights_of_any_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write_atomic(tmp_path / "a", lambda temporary: temporary.write_text(""))
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_folders_are_made_with_their_parents(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert make_folder(str(folder)) == folder
    assert names(folder) == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "c"):
        with pytest.raises(OutputError, match=r"cannot write to the folder .*; choose another one"):
            make_folder(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=20)
@given(content=st.binary(max_size=100), times=st.integers(0, 40_000))
def test_sha256_is_that_of_the_content(tmp_path: Path, content: bytes, times: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(content * times)
    assert sha256(path) == hashlib.sha256(content * times).hexdigest()


# State dicts


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=generator),
        "a.bias": torch.randn(3, generator=generator).to(torch.bfloat16),
        "b.count": torch.tensor(7),
        "b.empty": torch.zeros(0, 2),
        "b.mask": torch.tensor([True, False]),
        "c.double": torch.randn(2, generator=generator, dtype=torch.float64),
    }


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@FORMATS
def test_a_state_dict_survives_its_file(name: str, tmp_path: Path) -> None:
    path = save_state_dict(state(), tmp_path / name)
    assert path == tmp_path / name
    assert equal(load_state_dict(path), state())
    assert equal(load_state_dict(str(path)), state())
    assert names(tmp_path) == [name]


@FORMATS
def test_tied_and_viewed_tensors_are_written_by_value(name: str, tmp_path: Path) -> None:
    weight = torch.arange(100.0).reshape(10, 10)
    parameter = nn.Parameter(weight.clone())
    tensors = {"a": weight, "b": weight, "row": weight[2], "column": weight.T[3], "parameter": parameter}
    path = save_state_dict(tensors, tmp_path / name)
    assert equal(load_state_dict(path), {n: t.detach() for n, t in tensors.items()})
    small = save_state_dict({"row": torch.zeros(10_000, 10)[2]}, tmp_path / f"small-{name}")
    assert small.stat().st_size < 10_000


def test_safetensors_are_known_by_their_content(tmp_path: Path) -> None:
    path = save_state_dict(state(), tmp_path / "net.safetensors")
    other = path.rename(tmp_path / "net.ckpt")
    assert equal(load_state_dict(other), state())


def test_metadata_stand_beside_the_tensors(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = save_state_dict(state(), tmp_path / "net.safetensors", {"made": "today"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"made": "today"}


def test_a_model_survives_its_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    path = save_state_dict(model.state_dict(), tmp_path / "net.pt")
    twin = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    twin.load_state_dict(load_state_dict(path))
    assert equal(dict(twin.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_nested_and_prefixed_state_dicts_are_opened(key: str, prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    prefixed = {prefix + name: tensor for name, tensor in state().items()}
    torch.save({key: prefixed, "epoch": 3, "optimizer": {"lr": 0.1}}, path)
    assert equal(load_state_dict(path), state())
    torch.save(prefixed, path)
    assert equal(load_state_dict(path), state())


def test_a_prefix_on_some_names_only_is_part_of_them(tmp_path: Path) -> None:
    tensors = {"module.a": torch.zeros(2), "b": torch.ones(2)}
    torch.save(tensors, tmp_path / "net.pt")
    assert equal(load_state_dict(tmp_path / "net.pt"), tensors)


def test_a_tensor_called_model_is_a_tensor(tmp_path: Path) -> None:
    tensors = {"model": torch.zeros(2), "b": torch.ones(2)}
    torch.save(tensors, tmp_path / "net.pt")
    assert equal(load_state_dict(tmp_path / "net.pt"), tensors)


def test_the_old_format_of_pytorch_is_read(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert equal(load_state_dict(tmp_path / "old.pt"), state())


# What is refused


@FORMATS
def test_a_truncated_file_is_refused(name: str, tmp_path: Path) -> None:
    whole = save_state_dict(state(), tmp_path / name).read_bytes()
    path = tmp_path / f"cut-{name}"
    for length in (0, 1, 7, 8, 9, 20, 100, len(whole) // 4, len(whole) // 2, len(whole) - 50, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"cut-{name}"):
            load_state_dict(path)


def test_a_truncated_file_of_the_old_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(state(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in (0, 1, 10, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"old\.pt"):
            load_state_dict(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(content=st.binary(max_size=300), suffix=st.sampled_from(["pt", "safetensors"]))
def test_any_other_bytes_are_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"noise.{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="noise"):
        load_state_dict(path)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_file_is_refused_and_not_run(new: bool, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "net.pt"
    torch.save({"a": torch.zeros(2), "bomb": Bomb(trace)}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match=r"net\.pt was refused: .* could run code\. Save model\.state_dict\(\)"):
        load_state_dict(path)
    assert not trace.exists()
    path.write_bytes(pickle.dumps(Bomb(trace), protocol=2))
    with pytest.raises(CheckpointError, match=r"net\.pt"):
        load_state_dict(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes()).close()  # it would have worked
    assert trace.exists()


def test_a_whole_model_in_a_file_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"Save model\.state_dict\(\) instead"):
        load_state_dict(tmp_path / "net.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(2), "epoch": 3}, "entries that are no tensors, such as 'epoch'"),
        ({"state_dict": {"a": 1.0}}, "entries that are no tensors, such as 'a'"),
        ({"state_dict": {}}, "holds nothing"),
        ({}, "holds nothing"),
        ([torch.zeros(2)], "holds a list, not a state dict"),
        (torch.zeros(2), "holds a Tensor, not a state dict"),
    ],
)
def test_what_is_no_state_dict_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(tmp_path / "net.pt")


def test_a_file_that_is_not_there_is_refused_with_its_whole_path(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError, match=f"no checkpoint at {path}"):
            load_state_dict(path)
