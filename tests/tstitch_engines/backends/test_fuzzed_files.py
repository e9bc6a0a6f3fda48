"""Altered engine files: they are refused with an error of ours, whatever bytes are changed, and quickly."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tstitch_engines.backends.torch_archive import check_archive
from tstitch_engines.bundle.onnx_files import NotOnnx, check_onnx
from tstitch_engines.errors import BadEngine, Unsafe

torch = pytest.importorskip("torch")
CHANGES = st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), min_size=1, max_size=6)
FUZZ = settings(max_examples=100, deadline=5000)


def made_graph() -> bytes:
    stored = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[16], data_location=TensorProto.EXTERNAL)
    stored.external_data.add(key="location", value="w.data")
    plain = helper.make_tensor("p", TensorProto.FLOAT, [2], [1.0, 2.0])
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=stored)], "inner", [], [])
    nodes = [helper.make_node("If", ["k"], ["y"], then_branch=inner, else_branch=inner)]
    content: bytes = helper.make_model(helper.make_graph(nodes, "g", [], [], [stored, plain])).SerializeToString()
    return content


GRAPH = made_graph()


def changed(content: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
    found = bytearray(content)
    for place, value in changes:
        found[place % len(found)] = value
    return bytes(found[: len(found) - cut % 8])


def tensors(message: Any) -> Iterator[TensorProto]:
    if isinstance(message, TensorProto):
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if hasattr(value, "__len__") else [value]:
                yield from tensors(inner)


@FUZZ
@given(changes=CHANGES, cut=st.integers(0, 7), raw=st.binary(max_size=64))
def test_graphs(changes: list[tuple[int, int]], cut: int, raw: bytes) -> None:
    """And what passes names no other file, as protobuf's own reader understands it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        (Path(folder) / "w.data").write_bytes(bytes(64))
        path.write_bytes(GRAPH)
        check_onnx(path, ["w.data"])
        for content in (changed(GRAPH, changes, cut), raw, GRAPH + raw, GRAPH[: len(GRAPH) // 2] + raw):
            path.write_bytes(content)
            try:
                check_onnx(path, ["w.data"])
                model = onnx.ModelProto.FromString(content)
            except (NotOnnx, Unsafe, DecodeError):
                continue
            places = {e.value for t in tensors(model) for e in t.external_data if e.key == "location"}
            assert places <= {"w.data"}


@FUZZ
@given(changes=CHANGES, cut=st.integers(0, 7), raw=st.binary(max_size=64))
def test_archives(changes: list[tuple[int, int]], cut: int, raw: bytes) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/models/model.json", "{}")
        archive.writestr("archive/data/weights/model_weights_config.json", '{"config": {}}')
        archive.writestr("archive/data/sample_inputs/model.pt", raw)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt2"
        for content in (changed(out.getvalue(), changes, cut), raw):
            path.write_bytes(content)
            with suppress(BadEngine, Unsafe):
                check_archive(torch, path)
