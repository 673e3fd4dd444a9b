import inspect

import pytest

import isthmus


def test_import_and_every_help_leave_torch_alone(python):
    code = """
import sys
from isthmus.cli import COMMANDS, main
import isthmus
assert main(["--help"]) == 0
imported = [name for name in COMMANDS if f"isthmus.commands.{name}" in sys.modules]
assert not imported, imported
for name in COMMANDS:
    assert main([name, "--help"]) == 0
heavy = {"torch", "numpy", "matplotlib", "scipy", "sklearn"} & set(sys.modules)
assert not heavy, heavy
isthmus.match
assert "torch" in sys.modules
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "Bring the units of checkpoint B" in done.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import isthmus",
        "import isthmus.merge",
        "from isthmus.merge import Merged",
        "from isthmus import merge, connect",
        "from isthmus.merge.merging import merge",
    ],
)
def test_merge_is_a_room_and_a_function_whatever_is_imported_first(python, imports):
    code = f"""
{imports}
import isthmus, torch
from isthmus.merge import Merged, connect as walk
from isthmus.merge.paths import Path
import isthmus.merge.paths
a, b = (torch.nn.Linear(2, 1, bias=False) for _ in range(2))
found = isthmus.merge([a, b], align=None)
assert isinstance(found, Merged)
assert torch.allclose(found.model.weight, (a.weight + b.weight) / 2)
assert isthmus.merge.connect is walk is isthmus.connect
assert isthmus.merge.paths.Path is Path
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_callable_room_tells_the_signature_and_documentation_of_the_function():
    from isthmus.merge.merging import merge

    assert inspect.signature(isthmus.merge) == inspect.signature(merge)
    assert isthmus.merge.__call__.__doc__ == merge.__doc__


def test_public_names():
    assert set(isthmus.__all__) <= set(dir(isthmus))
    for name in isthmus.__all__:
        assert getattr(isthmus, name) is not None
    from isthmus.align import Matching, match
    from isthmus.metrics import Moments

    assert isthmus.match is match
    assert isthmus.Matching is Matching
    assert isthmus.Moments is Moments
    with pytest.raises(AttributeError, match="no attribute 'mach'"):
        isthmus.mach  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_version_of_a_tree_that_was_never_installed(monkeypatch):
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    assert isthmus.__version__ == metadata.version("isthmus")
    monkeypatch.setattr(metadata, "version", missing)
    assert isthmus._version() == "0+source"
