"""What an ONNX file may read: files beside it that are listed with it, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tstitch_engines.backends.onnx_session import open_session
from tstitch_engines.bundle import onnx_files
from tstitch_engines.bundle.onnx_files import NotOnnx, check_onnx
from tstitch_engines.errors import Unsafe

VALUES = np.arange(16, dtype=np.float32)


def external(location: str, name: str = "w", **more: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[16], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(*tensors: TensorProto, nodes: tuple[Any, ...] = (), **graph: Any) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [16]) for name in "xy")
    first = helper.make_node("Add", ["x", tensors[0].name if tensors else "x"], ["y"])
    made = helper.make_graph([first, *nodes], "g", [x], [y], list(tensors), **graph)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def in_initialiser(tensor: TensorProto) -> onnx.ModelProto:
    return model(tensor)


def in_attribute(tensor: TensorProto) -> onnx.ModelProto:
    return model(nodes=(helper.make_node("Constant", [], ["c"], value=tensor),))


def in_sparse(tensor: TensorProto) -> onnx.ModelProto:
    indices = numpy_helper.from_array(np.arange(16), "i")
    return model(sparse_initializer=[helper.make_sparse_tensor(tensor, indices, [16])])


def in_subgraph(tensor: TensorProto) -> onnx.ModelProto:
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [], [])
    for _ in range(3):
        inner = helper.make_graph(
            [helper.make_node("If", ["k"], [], then_branch=inner, else_branch=inner)], "inner", [], []
        )
    return model(nodes=tuple(inner.node))


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    made = model()
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    made.functions.append(helper.make_function("own", "F", [], ["c"], [node], [helper.make_opsetid("", 20)]))
    return made


def in_training(tensor: TensorProto) -> onnx.ModelProto:
    made = model()
    made.training_info.add().initialization.initializer.append(tensor)
    return made


PLACES = (in_initialiser, in_attribute, in_sparse, in_subgraph, in_function, in_training)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "bundle"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(VALUES.tobytes())
    for name in ("w.data", "unlisted.data"):
        (inside / name).write_bytes(VALUES.tobytes())
    (inside / "link.data").symlink_to(tmp_path / "secret")
    os.mkfifo(inside / "fifo.data")
    return inside


@pytest.mark.parametrize("place", PLACES)
def test_every_place_of_a_tensor_is_seen(folder: Path, place: Callable[[TensorProto], onnx.ModelProto]) -> None:
    path = folder / "m.onnx"
    path.write_bytes(place(external("unlisted.data", name="stolen")).SerializeToString())
    with pytest.raises(Unsafe, match=r"'stolen' reads .*, which is not among the files") as caught:
        open_session(path, ["w.data"], settings=None)
    assert caught.value.exit_code == 2
    assert "do not trust" in caught.value.hint


def test_a_listed_file_is_read(folder: Path) -> None:
    import onnxruntime

    path = folder / "m.onnx"
    path.write_bytes(in_initialiser(external("w.data", offset="0", length="64")).SerializeToString())
    session = open_session(path, ["w.data"], settings=onnxruntime.SessionOptions())
    assert np.array_equal(session.run(None, {"x": VALUES})[0], 2 * VALUES)


@pytest.mark.parametrize(
    ("location", "more", "words"),
    [
        ("../secret", {}, "plain name"),
        ("/etc/passwd", {}, "plain name"),
        ("./w.data", {}, "plain name"),
        ("sub/../w.data", {}, "plain name"),
        ("..", {}, "plain name"),
        ("..\\secret", {}, "plain name"),
        ("C:secret", {}, "plain name"),
        ("*/_ORT_MEM_ADDR_/*", {"offset": "4096"}, "plain name"),  # ONNX Runtime: any address in memory
        ("", {}, "plain name"),
        ("w.data\0", {}, "plain name"),
        ("link.data", {}, "is a link"),
        ("fifo.data", {}, "not a regular file"),
        ("w.data", {"offset": "1", "length": "64"}, "from 1 to 65, which has 64 bytes"),
        ("w.data", {"offset": "-4"}, "the offset '-4'"),
        ("w.data", {"length": "9" * 5000}, "the length '999"),
        ("w.data", {"basepath": ".."}, "has a 'basepath'"),
    ],
)
def test_locations(folder: Path, location: str, more: dict[str, str], words: str) -> None:
    path = folder / "m.onnx"
    path.write_bytes(in_initialiser(external(location, **more)).SerializeToString())
    with pytest.raises(Unsafe, match=words):
        check_onnx(path, ["w.data", "link.data", "fifo.data"])


def test_what_protobuf_reads_twice(folder: Path) -> None:
    """Of a field that comes again the last one counts, and messages are merged: a tensor in two halves."""
    path = folder / "m.onnx"
    twice = external("w.data")
    twice.external_data.add(key="location", value="/etc/passwd")
    path.write_bytes(in_initialiser(twice).SerializeToString())
    with pytest.raises(Unsafe, match="has a 'location'; allowed once"):
        check_onnx(path, ["w.data"])
    good, bad = (in_initialiser(external(name)).SerializeToString() for name in ("w.data", "/etc/passwd"))
    path.write_bytes(good + bad)
    with pytest.raises((Unsafe, NotOnnx)):
        check_onnx(path, ["w.data"])
    # the key spelt again as a number, which protobuf steps over as unknown
    entry = TensorProto()
    entry.external_data.add(key="location", value="/etc/passwd")
    raw = entry.SerializeToString()
    tampered = bytes([raw[0], raw[1] + 4]) + raw[2:] + b"\x08\x01\x10\x01"
    tensor = external("w.data").SerializeToString() + tampered
    assert TensorProto.FromString(tensor).external_data[-1].value == "/etc/passwd"
    attribute = b"\x0a\x01v\x2a" + bytes([len(tensor)]) + tensor
    node = b"\x2a" + bytes([len(attribute)]) + attribute
    graph = b"\x0a" + bytes([len(node)]) + node
    assert len(graph) < 128
    path.write_bytes(b"\x3a" + bytes([len(graph)]) + graph)
    with pytest.raises(Unsafe, match="has a 'location'; allowed once"):
        check_onnx(path, ["w.data"])


def test_compiled_engines_of_other_libraries_are_refused(folder: Path) -> None:
    node = helper.make_node("EPContext", ["x"], ["z"], domain="com.microsoft", embed_mode=0, ep_cache_context="engine")
    path = folder / "m.onnx"
    path.write_bytes(in_function(TensorProto()).SerializeToString())
    check_onnx(path)
    path.write_bytes(model(nodes=(node,)).SerializeToString())
    with pytest.raises(Unsafe, match="EPContext"):
        check_onnx(path)


def nested(depth: int) -> bytes:
    """A graph in a node's attribute in a graph..., by hand: protobuf itself stops at 100."""

    def field(number: int, content: bytes) -> bytes:
        size, count = b"", len(content)
        while count > 127:
            size, count = size + bytes([count & 127 | 128]), count >> 7
        return bytes([number << 3 | 2]) + size + bytes([count]) + content

    inner = b""
    for _ in range(depth):
        inner = field(1, field(5, field(6, inner)))
    return field(7, inner)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\x1c\0\0\0ORTM" + bytes(100), "ONNX Runtime's own format"),
        (b'{"graph": {}}', "is no ONNX model"),
        (b"ir_version: 9\ngraph {\n}\n", "is no ONNX model"),
        (b"<ir_version: 9>\ng (float[1] x) => (float[1] y) {}", "is no ONNX model"),
        (model().SerializeToString()[:-3], "a field ends at"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "a field ends at"),
        (b"\x3a" + b"\x80" * 20, "does not end"),
        (b"\x08\x09", "0 graphs"),
        (b"\x3a\0\x3a\0", "2 graphs"),
        (nested(500), "nested deeper"),
    ],
)
def test_files_that_are_no_models(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(NotOnnx, match=words):
        check_onnx(path)


def test_fields_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "_FIELDS", 1000)
    (tmp_path / "m.onnx").write_bytes(b"\x3a\0" + b"\x08\x01" * 1000)
    with pytest.raises(NotOnnx, match="more than 1,000 fields"):
        check_onnx(tmp_path / "m.onnx")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.onnx")
    for name in ("fifo.onnx", "nothing.onnx", "."):
        with pytest.raises(NotOnnx):
            check_onnx(tmp_path / name)


def test_weights_are_stepped_over(tmp_path: Path) -> None:
    """4 GiB of them, in a file with a hole."""
    path, size = tmp_path / "m.onnx", 1 << 32
    if shutil.disk_usage(tmp_path).free < size:
        pytest.skip("a small disk")

    def varint(value: int) -> bytes:
        return bytes([value >> shift & 127 | 128 for shift in range(0, 35, 7)]) + b"\0"

    tensor = b"\x4a" + varint(size)
    initialiser = b"\x2a" + varint(len(tensor) + size)
    graph = b"\x3a" + varint(len(initialiser) + len(tensor) + size)
    with path.open("wb") as out:
        out.write(graph + initialiser + tensor)
        out.truncate(len(graph + initialiser + tensor) + size)
    check_onnx(path)
