"""Engine identities: equal records hash equally everywhere, and a mismatch names every field."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import pytest

from tstitch_engines.bundle.identity import check_identity, differences, digest, model_digest
from tstitch_engines.bundle.manifest import Component, EngineIdentity
from tstitch_engines.errors import BadEngine
from tstitch_engines.spec import Range, ShapeProfile


def identity(**changes: Any) -> EngineIdentity:
    fields: dict[str, Any] = {
        "schema": 1,
        "backend": "onnxruntime",
        "backend_version": "1.20.0",
        "onnx_sha256": "ab" * 32,
        "precision": "fp32",
        "profile": ShapeProfile({"B": Range(1, 8, 16)}),
        "arch": "x86_64-avx2",
        "options": {"level": "all", "tf32": False},
    }
    return EngineIdentity(**(fields | changes))


def test_digest_is_that_of_sorted_json() -> None:
    record = {
        "arch": "x86_64-avx2",
        "backend": "onnxruntime",
        "backend_version": "1.20.0",
        "onnx_sha256": "ab" * 32,
        "options": {"level": "all", "tf32": False},
        "precision": "fp32",
        "profile": {"dims": {"B": {"max": 16, "min": 1, "opt": 8}}},
        "schema": 1,
    }
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    assert digest(identity()) == hashlib.sha256(text.encode()).hexdigest()
    assert digest(identity(options={"tf32": False, "level": "all"})) == digest(identity())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"arch": "sm_90"}, [("arch", "x86_64-avx2", "sm_90")]),
        ({"profile": ShapeProfile({"B": Range(1, 1, 1)})}, [("profile.B", "1:8:16", "1:1:1")]),
        ({"options": {"level": "all"}}, [("options.tf32", "False", "nothing")]),
        (
            {"backend_version": "1.30", "options": {"level": "all", "tf32": False, "new": 1}},
            [("backend_version", "1.20.0", "1.30"), ("options.new", "nothing", "1")],
        ),
    ],
)
def test_every_difference_is_named_and_changes_the_digest(changes: dict[str, Any], expected: list[Any]) -> None:
    other = identity(**changes)
    assert differences(identity(), other) == expected
    assert (digest(other) == digest(identity())) == (not expected)
    if not expected:
        check_identity(identity(), other, what="engine", rebuild="make")
        return
    with pytest.raises(BadEngine) as caught:
        check_identity(identity(), other, what="the engine of 'small'", rebuild="tstitch-trt build fashion")
    assert "tstitch-trt build fashion" in caught.value.hint
    for field, stored, here in expected:
        assert f"{field} is {stored} in the bundle and {here} here" in caught.value.message


def test_no_field_is_left_out_of_the_comparison() -> None:
    for field in msgspec.structs.fields(EngineIdentity):
        value = getattr(identity(), field.name)
        other = {"profile": ShapeProfile({"B": Range(2, 2, 2)}), "options": {}, "schema": 2, "precision": "fp16"}
        changed = msgspec.structs.replace(identity(), **{field.name: other.get(field.name, f"{value}x")})
        assert differences(identity(), changed), field.name


def test_model_digest_covers_names_and_contents() -> None:
    graph, data = Component(path="a/m.onnx", sha256="11", bytes=1), Component(path="a/m.data", sha256="22", bytes=1)
    assert model_digest([graph]) == "11"
    both = model_digest([graph, data])
    assert both == model_digest([data, msgspec.structs.replace(graph, path="elsewhere/m.onnx")])
    assert both != model_digest([graph, msgspec.structs.replace(data, sha256="33")])
    assert both != model_digest([graph, msgspec.structs.replace(data, path="a/other.data")])
