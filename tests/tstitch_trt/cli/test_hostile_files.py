"""Files that somebody made to do harm, given to a command: exit code 2, one error with its hint, at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.command import Command, refused
from support.manifests import manifest
from tstitch_engines.bundle.bundle import MANIFEST, write_bundle


def _change(path: Path, key: str, text: str) -> None:
    data = json.loads(path.read_bytes())
    data[key] = "HERE"
    path.write_text(json.dumps(data).replace('"HERE"', text))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


MANIFESTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nesting": (lambda path: path.write_bytes(b"[" * 1_000_000), "nested deeper than 64"),
    "nesting within": (lambda path: _change(path, "notes", "[" * 100 + "]" * 100), "nested deeper than 64"),
    "digits": (lambda path: _change(path, "name", "9" * 5000), "a number of 5,000 digits"),
    "infinite": (lambda path: _change(path, "name", "1e999"), "not finite"),
    "size": (lambda path: os.truncate(path, 1 << 40), "1,099,511,627,776 bytes; allowed are 8,388,608"),
    "pipe": (_pipe, "a pipe, not a regular file"),
    "device": (lambda path: _link(path, "/dev/zero"), "a device, not a regular file"),
    "endless": (lambda path: _link(path, "/proc/self/pagemap"), "allowed are 8,388,608"),
    "link loop": (lambda path: _link(path, MANIFEST), "Too many levels of symbolic links"),
    "terminal": (lambda path: _change(path, "name", r'"\u001b[2J"'), r"'\x1b[2J'"),
    "half a character": (lambda path: _change(path, "name", r'"\ud800"'), "half a character"),
    "twice": (lambda path: _change(path, "name", '"a", "name": "b"'), "the key 'name' twice"),
    "latent": (lambda path: _change(path, "latent", '{"channels": 1e9, "height": 8, "width": 8}'), "latent.channels"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, problem = MANIFESTS[kind]
    write_bundle(tmp_path / "a.bundle", lambda staging: manifest())
    change(tmp_path / "a.bundle" / MANIFEST)
    refused(Command(capfd)("inspect", tmp_path / "a.bundle"), problem)


def test_recipes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, path = Command(capfd), tmp_path / "my.toml"
    for content, problem in (
        (b"a = " + b"[" * 50_000, "nested"),
        (b"a = " + b"9" * 5000, "digits"),
        (b"\xff", "UTF-8"),
    ):
        path.write_bytes(content)
        refused(run("build", path, "-o", tmp_path / "out"), problem, "my.toml")
    _pipe(path)
    refused(run("build", path, "-o", tmp_path / "out"), "a pipe, not a regular file")
    _link(path, path.name)
    refused(run("build", path, "-o", tmp_path / "out"), "Too many levels")


def test_arrays_and_prompts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Command(capfd)
    np.savez(tmp_path / "a.npz", prompt_embeds=np.array([{}], dtype=object))
    os.mkfifo(tmp_path / "pipe")
    write_bundle(tmp_path / "a.bundle", lambda staging: manifest())
    for option, name, problem in (
        ("--latents-in", "pipe", "a pipe"),
        ("--latents-in", "a.npz", "several arrays"),
    ):
        refused(run("sample", tmp_path / "a.bundle", option, tmp_path / name, "-o", tmp_path / "a.png"), problem)
