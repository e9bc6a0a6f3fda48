"""ONNX in a stranger's bundle, with right hashes, that would read files which the manifest does not list."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest

from support.command import Command, refused
from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import MANIFEST
from tstitch_engines.bundle.files import hash_file


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def bundle(tiny_pair: TinyPair, tmp_path: Path) -> Path:
    shutil.copytree(tiny_pair.bundle, tmp_path / "a.bundle")
    return tmp_path / "a.bundle"


def graph(member: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = member["onnx"][0]
    return found


def engine(member: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = member["engines"][0]["files"][0]
    return found


def steal(bundle: Path, part: Callable[[dict[str, Any]], dict[str, Any]], location: str) -> None:
    """Makes the first weight of a file of ``small`` one that lies in ``location``, and states the new hash."""
    data = msgspec.json.decode((bundle / MANIFEST).read_bytes())
    component = part(data["members"]["small"])
    path = bundle / component["path"]
    model = onnx.load(path, load_external_data=False)
    tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())
    component["sha256"], component["bytes"] = hash_file(path)
    if part is graph:
        for record in data["members"]["small"]["engines"]:
            record["identity"]["onnx_sha256"] = component["sha256"]
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(data))


@pytest.mark.parametrize("location", ["/etc/passwd", "../../secret", "unlisted.data"])
def test_a_graph_is_refused_when_the_bundle_is_opened(run: Command, bundle: Path, location: str) -> None:
    (bundle / "small" / "unlisted.data").write_bytes(bytes(1 << 20))
    steal(bundle, graph, location)
    output = ("-o", bundle.with_name("b.bundle"))
    for command in (
        ("inspect", bundle),
        ("sample", bundle),
        ("verify", bundle, "--layers"),
        ("bench", bundle, "--against", "torch"),
        ("build", bundle, *output),
        ("sample", bundle, "--rebuild"),
        ("quantise", bundle, "--member", "small", "--mode", "int8", *output),
    ):
        refused(run(*command), "is refused", f"reads {location!r}", "do not trust")


def test_an_engine_is_refused_when_it_is_loaded(run: Command, bundle: Path) -> None:
    steal(bundle, engine, "/etc/passwd")
    for command in ("sample", "bench"):
        refused(run(command, bundle), "is refused", "reads '/etc/passwd'", "do not trust")
    outcome = run("verify", bundle, "--members", "small", "--samples", 1, "--json", "--layers")
    assert outcome.code == 1
    assert outcome.json["engines"][0]["status"] == "failed"
    assert "reads '/etc/passwd'" in outcome.json["engines"][0]["reason"]
