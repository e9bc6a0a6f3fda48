"""Reading checkpoints: what is unwrapped, what is refused, and that no code in a file ever runs."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.checkpoint import read_checkpoint, read_safetensors_header

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


class Evil:
    """Unpickling this runs a shell command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle", "nested"])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, form: str) -> None:
    proof, path = tmp_path / "ran", tmp_path / "model.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Evil(proof)))
    else:
        content = {"ema": STATE, "args": Evil(proof)} if form == "nested" else Evil(proof)
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(BadCheckpoint, match="holds more than tensors") as caught:
        read_checkpoint(path)
    assert not proof.exists()
    assert "safetensors" in caught.value.hint
    if form != "pickle":  # a newer pickle protocol, of which the safe reader does not even read the names
        assert "could run code: it names posix.system" in caught.value.message
    if form == "torch":  # the file is a real danger: the unsafe way of loading does run it
        torch.load(path, weights_only=False)
        assert proof.exists()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"ema": s, "model": {"other": torch.zeros(1)}, "opt": {"state": {}}},
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": s},
        lambda s: {"ema": {"model": s}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"ema": s, "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4)},
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_published_wrappings(tmp_path: Path, wrap: Any, legacy: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(wrap(STATE), path, _use_new_zipfile_serialization=not legacy)
    checkpoint = read_checkpoint(path)
    assert checkpoint.shapes == {"a.weight": (2, 3), "b": (4,)}
    tensors = checkpoint.tensors()
    assert all(torch.equal(tensors[name], STATE[name]) for name in STATE)


def test_safetensors_header_says_where_the_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(STATE, path, metadata={"format": "pt"})
    header = read_safetensors_header(path)
    assert {name: (entry.dtype, entry.shape) for name, entry in header.items()} == {
        "a.weight": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
    }
    entry = header["a.weight"]
    stored = path.read_bytes()[entry.start : entry.start + entry.length]
    assert stored == STATE["a.weight"].numpy().tobytes()
    assert torch.equal(read_checkpoint(path).tensors()["b"], STATE["b"])


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    for name, save in (("a.safetensors", save_file), ("a.pt", torch.save)):
        whole = tmp_path / name
        save(STATE, whole)
        for keep in (4, 100, whole.stat().st_size - 1):
            short = tmp_path / f"short{whole.suffix}"
            short.write_bytes(whole.read_bytes()[:keep])
            with pytest.raises(BadCheckpoint, match=r"damaged|not a whole"):
                read_checkpoint(short)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>404</html>" * 10, "HTML page"),
        (os.urandom(4096), "damaged|not a whole"),
    ],
)
def test_other_files_are_named(tmp_path: Path, suffix: str, content: bytes, words: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(BadCheckpoint, match=words):
        read_checkpoint(path)


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="does not exist"):
        read_checkpoint(tmp_path / "none.pt")
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(BadCheckpoint, match=r"has the ending '.onnx'"):
        read_checkpoint(tmp_path / "model.onnx")
    torch.save({"epoch": 3, "model": "DiT"}, tmp_path / "no.pt")
    with pytest.raises(BadCheckpoint, match=r"holds no state dict.*epoch, model"):
        read_checkpoint(tmp_path / "no.pt")
