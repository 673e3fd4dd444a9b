"""The package as it is built, installed and imported; its rooms; the examples in its documentation."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# room: the rooms that it may import
ROOMS = {
    "base": set(),
    "zoo": {"base"},
    "metrics": {"base"},
    "align": {"base", "metrics"},
    "merge": {"base", "metrics", "align"},
}
HOUSE = (*ROOMS, "isthmus")


def packages() -> list[str]:
    found = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert found
    return re.findall(r'"([\w.]+)"', found[1])


def modules() -> Iterator[str]:
    for name in packages():
        yield name
        folder = Path(str(importlib.import_module(name).__file__)).parent
        for module in pkgutil.walk_packages([str(folder)], f"{name}."):
            if not module.ispkg and not module.name.endswith("__main__"):
                yield module.name


def sources() -> list[Path]:
    return sorted(path for room in HOUSE for path in (ROOT / room).rglob("*.py"))


# Documentation


@pytest.mark.parametrize("name", list(dict.fromkeys(modules())))
def test_examples_in_the_documentation_are_right(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(name)
    with torch.random.fork_rng():
        result = doctest.testmod(module)
    assert result.failed == 0, capsys.readouterr().out


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    count = dict.fromkeys(ROOMS, 0)
    for name in modules():
        room = name.split(".")[1] if "." in name else "isthmus"
        if room in count:
            count[room] += sum(bool(test.examples) for test in finder.find(importlib.import_module(name)))
    assert min(count.values()) > 0, count


# Rooms


def imported(path: Path) -> Iterator[str]:
    """The rooms that a module imports, whether at its top or inside a function; "isthmus" for the front door."""
    depth = len(path.relative_to(ROOT).parts) - 1  # of folders
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            outside = node.level - depth
            assert outside <= 1, f"{path}:{node.lineno} reaches beyond the package"
            if outside == 1:
                yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            yield from ["isthmus"] if str(node.module).split(".")[0] == "isthmus" else []
        elif isinstance(node, ast.Import):
            yield from ["isthmus" for alias in node.names if alias.name.split(".")[0] == "isthmus"]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_from_the_rooms_above(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        found = set(imported(path))
        assert found <= ROOMS[room], f"{path.relative_to(ROOT)} imports {', '.join(sorted(found - ROOMS[room]))}"


def test_imports_between_rooms_are_seen() -> None:
    assert "metrics" in set(imported(ROOT / "align" / "nets" / "activations.py"))
    assert "base" in {room for path in (ROOT / "zoo").glob("*.py") for room in imported(path)}


def test_no_module_is_too_long() -> None:
    long = {str(path.relative_to(ROOT)): n for path in sources() if (n := len(path.read_text().splitlines())) > 400}
    assert long == {}


def test_every_folder_with_code_is_a_package() -> None:
    folders = {"isthmus." + ".".join(path.parent.relative_to(ROOT).parts) for path in sources()}
    assert {name.replace("isthmus.isthmus", "isthmus") for name in folders} == set(packages())


# Installing


def run(*command: object, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV", "PIP"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(python: object, *arguments: object, cwd: Path) -> None:
    run(python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments, cwd=cwd)


# Prints where modules are from and, where asked, what a piece of work gives that the rooms take part in.
PROBE = """
import importlib.util, json, sys
sys.path[:0] = {paths}
import isthmus
heavy = sorted({{"torch", "matplotlib", "sklearn", "scipy", "numpy"}} & set(sys.modules))
names = ["isthmus"] + ["isthmus." + room for room in ("align", "base", "merge", "metrics", "zoo")] + {more}
files = {{name: importlib.util.find_spec(name).origin for name in names}}
groups = None
if {work}:
    import torch
    import isthmus.align, isthmus.merge, isthmus.metrics, isthmus.zoo
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    groups = [group.size for group in isthmus.align.symmetry(model, torch.randn(5, 4)).groups]
    assert all(sys.modules[name].__file__ == files[name] for name in names if name in sys.modules)
print(json.dumps({{"files": files, "heavy": heavy, "groups": groups}}))
"""


def probe(
    python: object,
    cwd: Path,
    *paths: Path,
    work: bool = False,
    isolated: bool = True,
    more: tuple[str, ...] = (),
    **environment: str,
) -> dict[str, Any]:
    code = PROBE.format(paths=[str(path) for path in paths], more=list(more), work=work)
    return json.loads(run(python, *(["-I"] if isolated else []), "-c", code, cwd=cwd, **environment))


def is_whole(found: dict[str, Any], folder: Path) -> bool:
    inside = [Path(f).resolve().is_relative_to(folder.resolve()) for n, f in found["files"].items() if "isthmus" in n]
    return len(inside) == 6 and all(inside)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("source")
    for name in HOUSE:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, copied, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    pip(sys.executable, "install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def test_a_wheel_holds_the_whole_house_and_nothing_else(target: Path) -> None:
    installed = {path.relative_to(target / "isthmus") for path in (target / "isthmus").rglob("*.py")}
    expected = {path.relative_to(ROOT) for path in sources()}
    front = {path.relative_to("isthmus") if path.parts[0] == "isthmus" else path for path in expected}
    assert installed == front
    assert (target / "isthmus" / "py.typed").exists()
    assert {path.name for path in target.iterdir()} - {"bin"} == {
        "isthmus",
        *(path.name for path in target.glob("isthmus-*.dist-info")),
    }


@pytest.mark.parametrize("place", ["elsewhere", "repository"])
def test_a_wheel_works_from_any_folder(place: str, target: Path, tmp_path: Path) -> None:
    found = probe(sys.executable, ROOT if place == "repository" else tmp_path, target, work=place == "elsewhere")
    assert is_whole(found, target), found
    assert found["groups"] == ([6] if place == "elsewhere" else None)
    # the command line answers before anything heavy is there
    assert found["heavy"] == []


def test_at_the_root_of_a_source_tree_that_tree_is_imported_whole(copied: Path, target: Path) -> None:
    found = probe(sys.executable, copied, isolated=False, PYTHONPATH=str(target))
    assert is_whole(found, copied), found


def test_a_neighbour_called_metrics_is_left_in_peace(wheel: Path, tmp_path: Path) -> None:
    project, target = tmp_path / "project", tmp_path / "target"
    project.mkdir()
    (project / "metrics.py").write_text("NAME = 'the neighbour'\n")
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "neighbour"\nversion = "1"\n[tool.setuptools]\npy-modules = ["metrics"]\n'
    )
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, project, cwd=tmp_path)
    (other,) = tmp_path.glob("neighbour-*.whl")
    pip(sys.executable, "install", "--no-deps", "--no-index", "--target", target, other, wheel, cwd=tmp_path)
    found = probe(sys.executable, tmp_path, target, more=("metrics",))
    assert is_whole(found, target), found
    assert Path(found["files"]["metrics"]) == target / "metrics.py"


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_an_editable_install_resolves_into_the_sources(mode: str, copied: Path, tmp_path: Path) -> None:
    source, home = tmp_path / "source", tmp_path / "venv"
    shutil.copytree(copied, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path)
    python = home / "bin" / "python"
    # what the project needs comes from here; the .pth files there are not read, so that its own isthmus stays away
    (site,) = home.glob("lib/python*/site-packages")
    (site / "needs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--config-settings", "editable_mode=strict"] if mode == "strict" else []
    # --ignore-installed: whatever is installed where the needs come from must not be touched
    pip(
        python,
        *("install", "--ignore-installed", "--no-deps", "--no-index", "--no-build-isolation", *options, "-e", source),
        cwd=tmp_path,
    )
    found = probe(python, tmp_path, work=mode == "strict")
    assert is_whole(found, source), found
