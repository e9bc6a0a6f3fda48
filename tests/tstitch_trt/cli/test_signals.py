"""Ctrl-C, SIGTERM and SIGHUP at any moment: an exit code, no traceback, and nothing half-made is left."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = "import sys\nfrom tstitch_trt.cli import main\nsys.exit(main())\n"

# A command that has something in the making, and while it removes that gets the signal again.
MAKING = """
import os, shutil, signal, sys, tempfile, threading, time
import click
from tstitch_trt import cli

@click.command()
@click.argument("folder")
@click.argument("again", type=int)
def make(folder, again):
    class Slow:
        def __exit__(self, *error):
            for _ in range(20):
                os.kill(os.getpid(), again)
                time.sleep(0.001)
            return False
        def __enter__(self): pass
    with tempfile.TemporaryDirectory(dir=folder), Slow():
        print("ready", flush=True)
        for _ in range(600):  # a signal that comes before the first sleep begins does not end it
            time.sleep(0.1)

cli.cli = make
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("way", "moment"), [("script", 0), ("script", 120), ("module", 20), ("module", 250)])
def test_ctrl_c_while_the_command_line_starts(tmp_path: Path, way: str, moment: int) -> None:
    """``moment``: so many imports after the first one of ours."""
    script = tmp_path / "tstitch-trt"
    script.write_text(SCRIPT)
    words = [str(script)] if way == "script" else ["-m", "tstitch_trt.cli"]
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", *words, "inspect", str(tmp_path)], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:  # an import is written when it is done
            if line.endswith(" tstitch_trt.start\n"):
                break
        for _ in range(moment):
            process.stderr.readline()
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert said.endswith("interrupted\n")


def test_a_program_that_imports_us_keeps_its_ctrl_c() -> None:
    script = (
        "import signal, tstitch_trt.cli\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "tstitch_trt.cli.main(['cache', '--help'])\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "from tstitch_trt.cli._signals import watch_signals\n"
        "with watch_signals(): assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN\n"
    )
    subprocess.run([sys.executable, "-c", script, "-m", "tstitch_trt.cli"], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("number", "again", "code", "said"),
    [
        (signal.SIGTERM, signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, signal.SIGINT, 129, "terminated"),
        (signal.SIGINT, signal.SIGTERM, 130, "interrupted"),
    ],
)
def test_a_second_signal_does_not_end_the_tidying_up(
    tmp_path: Path, number: signal.Signals, again: signal.Signals, code: int, said: str
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", MAKING, str(made), str(int(again))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert len(list(made.iterdir())) == 1
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.strip()) == (code, said)
    assert list(made.iterdir()) == []
