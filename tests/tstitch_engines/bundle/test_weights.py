"""A weight map that lies about the files is refused when it is opened or read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from support.manifests import manifest, member
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.files import describe_file
from tstitch_engines.bundle.weights import open_weights
from tstitch_engines.errors import BadBundle

STORED = {"file": "model.data", "offset": 4, "dtype": "float32", "shape": [2, 3]}
MAP = {"part": "unet", "weights": {"a": {"shape": [2, 3], "initialiser": "w"}}, "initialisers": {"w": STORED}}


def read(folder: Path, content: Any) -> Any:
    (folder / "model.data").write_bytes(bytes(4) + np.arange(6, dtype=np.float32).tobytes())
    (folder / "map.json").write_text(content if isinstance(content, str) else json.dumps(content))
    files = {"weights": describe_file(folder / "map.json")}
    network = msgspec.structs.replace(member(), onnx=(describe_file(folder / "model.data"),), files=files)
    return open_weights(Bundle(folder, manifest({"small": network})), "small", network).read("w")


def test_a_weight(tmp_path: Path) -> None:
    assert read(tmp_path, MAP).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"offset": -4}, "'initialisers.w.offset' is -4"),
        ({"offset": 8}, "which is shorter"),
        ({"shape": [2**32, 2**32]}, "which is shorter"),
        ({"shape": [-2, -3]}, "is -2"),
        ({"shape": [1] * 100}, "has 100 entries"),
        ({"dtype": "float33"}, "known are float32"),
        ({"file": "../../etc/passwd"}, "the weight map names ../../etc/passwd"),
    ],
)
def test_lies(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(BadBundle, match=problem):
        read(tmp_path, {**MAP, "initialisers": {"w": {**STORED, **change}}})


def test_what_is_no_map(tmp_path: Path) -> None:
    for content, problem in (("[" * 100_000, "nested"), ({**MAP, "initialisers": {}}, "not among the initialisers")):
        with pytest.raises(BadBundle, match=problem):
            read(tmp_path, content)
