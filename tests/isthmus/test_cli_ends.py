"""How the command line ends: exit codes, and what it says."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import click
import pytest

from isthmus import cli
from isthmus.cli import main


def test_without_arguments_it_helps(capsys):
    assert main([]) == 0
    assert "symmetry" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("isthmus ")


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "isthmus", "mtach"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: no command 'mtach'; did you mean match? (see 'isthmus --help')\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["connect"], "Missing argument 'A'"),
        (["match", "a", "b"], "Missing option '--model'"),
        (["match", "a", "b", "--model", "mlp", "--modle-args", "{}"], "--modle-args"),
        (["match", "a", "b", "--model", "mlp", "--model-args", "{'widths': 3}"], "is not JSON"),
        (["match", "a", "b", "--model", "mlp", "--model-args", "[3]"], "no JSON object"),
        (["symmetry", "--model", "mlp", "--input-shape", "1,x"], "numbers separated by commas"),
        (["symmetry", "--model", "mlp", "--input-shape", "1,-3"], "sizes must be positive"),
        (["connect", "a", "b", "--model", "mlp", "--points", "2"], "--points"),
        (["merge", "a", "--model", "mlp", "--out", "x.pt"], "two checkpoints or more"),
        (["merge", "a", "b", "--model", "mlp", "--out", "x.pt", "--weights", "1"], "1 numbers for 2 networks"),
        (["merge", "a", "b", "--model", "mlp", "--out", "x.pt", "--repair", "auto"], "--repair needs data"),
        (["merge", "a", "b", "--model", "mlp", "--out", "x.pt", "--align", "none", "--report", "r"], "align them"),
        (["match", "a", "b", "--model", "mlp", "--method", "activations"], "pass --data"),
        (["match", "a", "b", "--model", "mlp", "--method", "learned"], "reads data; pass --data"),
        (["match", "a", "b", "--model", "mlp", "--options", '{"choose": "midpoint"}'], "reads data; pass --data"),
        (["match", "a", "b", "--model", "mlp", "--method", "hungarian"], "'hungarian' is not one of"),
        (["train", "--model", "mlp", "--data", "digits", "--split", "test", "--out", "x.pt"], "--split does not go"),
        (["train", "--model", "mlp", "--data", "digits", "--device", "abacus", "--out", "x.pt"], "--device abacus"),
        (["connect", "a", "b", "--model", "mlp"], "pass --data"),
    ],
)
def test_wrong_use_is_said_in_one_paragraph(args, said, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(*args)
    assert said in message
    assert f"isthmus {args[0]} --help" in message or "isthmus --help" in message or "--" in message
    assert not list(tmp_path.iterdir())


def _failing(error: BaseException) -> click.Command:
    @click.command("demo")
    @click.option("--debug", is_flag=True, expose_value=False)
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize("debug", [False, True])
def test_failure_is_one_line_and_the_traceback_is_for_debug(monkeypatch, capsys, debug):
    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: _failing(ZeroDivisionError("of the world")))
    assert main(["demo", *["--debug"][:debug]]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: ZeroDivisionError: of the world" in captured.err
    assert ("Traceback" in captured.err) == debug


def test_interruption_is_130(monkeypatch, capsys):
    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: _failing(KeyboardInterrupt()))
    assert main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_warnings_go_to_standard_error_without_the_source_line(monkeypatch, capsys):
    @click.command("demo")
    def command() -> None:
        warnings.simplefilter("always")
        warnings.warn("the loss is NaN", UserWarning, stacklevel=1)

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: command)
    assert main(["demo"]) == 0
    assert capsys.readouterr().err == "warning: the loss is NaN\n"


def test_ctrl_c_in_the_middle_of_training_leaves_no_half_written_file(tmp_path):
    out, checkpoints = tmp_path / "a.safetensors", tmp_path / "epochs"
    args = ["train", "--model", "mlp", "--model-args", '{"widths": [8]}', "--data", "digits", "--epochs", "100000"]
    history = checkpoints / "history.json"
    with subprocess.Popen(
        [sys.executable, "-m", "isthmus", *args, "--out", str(out), "--checkpoints", str(checkpoints)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # a shell ignores Ctrl-C in what it runs in the background, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            patience = time.monotonic() + 120
            while not history.exists() and time.monotonic() < patience and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert not out.exists()
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".part"]
    assert json.loads(history.read_text())["train_loss"]  # whole
