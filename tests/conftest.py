"""What tests of several rooms share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def run_code(tmp_path: Path) -> Callable[[str], str]:
    """Run Python code as a user would, in a folder of its own, with warnings as errors; gives what it printed."""

    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
