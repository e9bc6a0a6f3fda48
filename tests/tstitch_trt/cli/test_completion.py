"""Completion in the shells themselves: bash and fish are asked, zsh is typed at in a terminal."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.command import Command, refused

BASH = """
eval "$(tstitch-trt completion bash)"
while IFS= read -r line; do
    read -ra COMP_WORDS <<< "$line"
    [[ "$line" == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    COMPREPLY=()
    _tstitch_trt_completion tstitch-trt
    echo "${COMPREPLY[*]}"
done
"""
ASKED = {
    "tstitch-trt sam": ["sample"],
    "tstitch-trt sample fashion.bundle --solver dpm": [
        "dpmpp-1", "dpmpp-1-sde", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m", "dpmpp-3m-sde", "dpmpp-2s", "dpmpp-3s",
    ],
    "tstitch-trt sample fashion.bundle --graph s": ["step", "segment"],
    "tstitch-trt sample fashion.bundle --labels Bag,Sn": ["Bag,Sneaker"],
    "tstitch-trt sample sub/": ["sub/other.bundle"],
    "tstitch-trt build fash": ["fashion"],
    "tstitch-trt nonsense --x": [],
    "tstitch-trt sample none.bundle --labels B": [],
    "tstitch-trt sample ~nobody-here/x --labels B": [],
    "tstitch-trt sample fashion.bundle --labels A": [],  # bash would make two words of Ankle boot
    "tstitch-trt sample evil --schedule ": ["good"],
    "tstitch-trt sample list --schedule ": [],
}  # fmt: skip


@pytest.fixture
def folder(fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a bundle, and ``tstitch-trt`` on the path."""
    (tmp_path / "fashion.bundle").symlink_to(fashion_bundle)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.bundle").symlink_to(fashion_bundle)
    for name, manifest in (("evil", '{"members": {"$(reboot)": 0, "a;b": 0, "good": 0}}'), ("list", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(manifest)
    program = tmp_path / "bin" / "tstitch-trt"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tstitch_trt.cli "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_bash(folder: Path) -> None:
    lines = "".join(f"{line}\n" for line in ASKED)
    done = subprocess.run(["bash", "--norc", "-c", BASH], input=lines, capture_output=True, text=True, cwd=folder)
    assert done.stderr == ""
    assert [line.split() for line in done.stdout.splitlines()] == list(ASKED.values())


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish(folder: Path) -> None:
    line = "tstitch-trt sample fashion.bundle --solver dpmpp-3"
    script = f"tstitch-trt completion fish | source; complete -C 'tstitch-trt sam'; complete -C '{line}'"
    done = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True, cwd=folder)
    words = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert words == ["sample", "dpmpp-3m", "dpmpp-3m-sde", "dpmpp-3s"], done.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh(folder: Path) -> None:
    """By ``eval``: as a file in ``$fpath`` click's script completes nothing at the second TAB."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvp("zsh", ["zsh", "-f", "-i"])  # noqa: S606
    try:
        os.write(terminal, b"PS1='> '; autoload -Uz compinit; compinit -u -D; eval \"$(tstitch-trt completion zsh)\"\n")
        os.write(terminal, b"echo rea''dy\n")
        _read_until(terminal, b"ready")
        os.write(terminal, b"tstitch-trt sam\t")
        _read_until(terminal, b"sample")
        os.write(terminal, b"fashion.bundle --solver un\t")
        _read_until(terminal, b"ipc")
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def _read_until(terminal: int, wanted: bytes) -> None:
    read, end = b"", time.monotonic() + 60
    while wanted not in read:
        assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], read
        read += os.read(terminal, 4096)


def test_other_shells_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    refused(Command(capfd)("completion", "tcsh"), "'tcsh'", "bash, zsh, fish")
