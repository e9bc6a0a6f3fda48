"""Reading checkpoints: what is unwrapped, what is refused, and that no code in a file ever runs."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.checkpoint.safetensors_file import read_safetensors_header

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


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "longer header than the file": (safetensors({"a": entry()}, b"1234", 1 << 40), "its header would be 1,099,511"),
    "header over the limit": (safetensors(b"{}" + b" " * (17 << 20)), "allowed are 16,777,216"),
    "negative header": (safetensors({}, length=(1 << 64) - 1), "its header would be"),
    "no object": (safetensors([]), "no JSON object"),
    "nested": (safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested deeper"),
    "digits": (safetensors(b'{"a": ' + b"9" * 5000 + b"}"), "5,000 digits"),
    "twice": (safetensors(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), b"1234"), "the key 'a' twice"),
    "overlap": (safetensors({"a": entry(), "b": entry()}, b"1234"), "'b' begins at byte"),
    "hole": (safetensors({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12)), "'b' begins at byte"),
    "beyond the file": (safetensors({"a": entry(shape=(2,), offsets=(0, 8))}, b"1234"), "its header promises"),
    "bytes of nobody": (safetensors({"a": entry()}, b"12345678"), "its header promises"),
    "backwards": (safetensors({"a": entry(offsets=(4, 0))}, b"1234"), "4 bytes, and has -4"),
    "before the file": (safetensors({"a": entry(offsets=(-4, 0))}, b"1234"), "the entry of 'a' is wrong"),
    "shape": (safetensors({"a": entry(shape=(2, 3))}, b"1234"), "'a' is F32 2x3, 24 bytes, and has 4"),
    "huge shape": (safetensors({"a": entry(shape=(2**48, 2**48))}, b"1234"), "and has 4"),
    "negative shape": (safetensors({"a": entry(shape=(-1, -1))}, b"1234"), "the entry of 'a' is wrong"),
    "many sides": (safetensors({"a": entry(shape=(1,) * 10_000)}, b"1234"), "the entry of 'a' is wrong"),
    "shape of text": (safetensors({"a": entry(shape="1")}, b"1234"), "the entry of 'a' is wrong"),
    "fractions": (safetensors({"a": entry(offsets=(0.5, 4))}, b"1234"), "the entry of 'a' is wrong"),
    "type": (safetensors({"a": entry(dtype="Q7")}, b"1234"), "the unknown type 'Q7'"),
    "type of number": (safetensors({"a": entry(dtype=7)}, b"1234"), "the entry of 'a' is wrong"),
    "more keys": (safetensors({"a": {**entry(), "run": "me"}}, b"1234"), "the entry of 'a' is wrong"),
    "metadata": (safetensors({"__metadata__": [1]}), "Expected `object`"),
}


@pytest.mark.parametrize("kind", LIES)
def test_safetensors_headers_that_lie_are_refused(kind: str, tmp_path: Path) -> None:
    content, problem = LIES[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadCheckpoint, match=problem):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "model.pt"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(BadCheckpoint, match="is not a file"):
        read_checkpoint(tmp_path / name)


def test_what_a_file_says_beside_its_tensors(tmp_path: Path) -> None:
    marked = {**STATE, "v_pred": torch.zeros(0)}
    save_file(marked, tmp_path / "a.safetensors", {"modelspec.prediction_type": "v"})
    read = read_checkpoint(tmp_path / "a.safetensors")
    assert read.metadata == {"modelspec.prediction_type": "v"}
    assert read.markers == {"v_pred"}
    assert "v_pred" not in read.shapes

    args = argparse.Namespace(model="SiT-XL/2", image_size=256, data=None, betas=(0.9, 0.95))
    state = {"ema": marked, "model": STATE, "opt": {"state": {0: torch.ones(2)}}, "args": args, "global_step": 7}
    torch.save(state, tmp_path / "b.pt")
    read = read_checkpoint(tmp_path / "b.pt")
    assert read.beside == {
        "args": {"model": "SiT-XL/2", "image_size": 256, "betas": [0.9, 0.95]},
        "global_step": 7,
        "v_pred": True,
    }
    assert read.markers == {"v_pred"}
    assert read.metadata == {}


def test_values_that_repeat_themselves_take_no_time(tmp_path: Path) -> None:
    inner: Any = 1
    for _ in range(5):
        inner = [inner] * 2000
    torch.save({"model": STATE, "args": inner}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").shapes.keys() == STATE.keys()
