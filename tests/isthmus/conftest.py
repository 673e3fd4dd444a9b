import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.base.files import save_state_dict
from isthmus.cli import main
from isthmus.zoo import Recipe, load_data, mlp, train

WIDTHS = [24, 16]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two trained networks, a.safetensors and b.safetensors."""
    folder = tmp_path_factory.mktemp("pair")
    data = load_data("digits")
    for seed, name in enumerate("ab"):
        model = mlp(64, WIDTHS, seed=seed)
        train(model, data, Recipe(epochs=8, lr=0.2, seed=seed), progress=False)
        save_state_dict(model.state_dict(), folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def network() -> list[str]:
    return ["--model", "mlp", "--model-args", json.dumps({"widths": WIDTHS})]


@pytest.fixture
def run_json(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a command with --json; its standard output must be one JSON object."""

    def run(*args: object) -> dict[str, Any]:
        code = main([*map(str, args), "--json"])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return json.loads(captured.out)

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused: exit code 2, one paragraph on standard error."""

    def run(*args: object) -> str:
        code = main(list(map(str, args)))
        captured = capsys.readouterr()
        assert code == 2, captured
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert "Traceback" not in captured.err
        return captured.err

    return run


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run code in a fresh interpreter."""

    def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)

    return run
