"""What refitting tells the library, over one that stands in for TensorRT. Not run on a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support.tensorrt_stand import Place, Stand, buffers, opened
from tstitch_engines.backends.tensorrt import engine as module
from tstitch_engines.backends.tensorrt.flavour import RTX, TENSORRT, Flavour
from tstitch_engines.errors import BadEngine, BadInput, FailedWork

ONNX = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "c": np.arange(4, dtype=np.uint16),  # the bits of bfloat16
}


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "gpu_and_driver", lambda index: ("a GPU", "13000"))
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))


class Fitted(Stand):
    """A library whose engine has the weights ``ONNX``, of which the last two were fused."""

    def __init__(self, flavour: Flavour) -> None:
        super().__init__(flavour)
        self.weights: dict[str, bytes] = {name: values.tobytes() for name, values in ONNX.items()}
        self.fused = {"b": ["c"]}
        stand = self

        class Refitter:
            def __init__(self, engine: Any, logger: Any) -> None:
                self.new: dict[str, tuple[int, int]] = {}

            def get_all_weights(self) -> list[str]:
                return list(stand.weights)

            def get_weights_prototype(self, name: str) -> Any:
                size = ONNX[name].size
                return SimpleNamespace(dtype=f"type of {name}", size=size, nbytes=len(stand.weights[name]))

            def set_named_weights(self, name: str, given: Any) -> bool:
                assert given.kind == f"type of {name}"
                self.new[name] = (given.address, len(stand.weights[name]))
                return f"set {name}" not in stand.refuse

            def get_missing_weights(self) -> list[str]:
                return [other for name in self.new for other in stand.fused.get(name, []) if other not in self.new]

            def refit_cuda_engine(self) -> bool:
                stand.calls.append(("refit_cuda_engine",))
                if "refit_cuda_engine" in stand.refuse:
                    return False
                assert not self.get_missing_weights()
                for name, (address, nbytes) in self.new.items():  # only now: the values have to be there until then
                    stand.weights[name] = ctypes.string_at(address, nbytes)
                return True

        self.library.Refitter = Refitter
        self.library.Weights = lambda kind, address, count: SimpleNamespace(kind=kind, address=address, count=count)


@pytest.mark.parametrize("flavour", [RTX, TENSORRT])
def test_weights_go_in_at_once_with_those_they_were_fused_with(flavour: Flavour, tmp_path: Path) -> None:
    stand, place = Fitted(flavour), Place()
    engine = opened(stand, place, tmp_path, flavour, refit=True)
    assert engine.refit_names == "initialiser"
    assert not engine.refit_keeps_recordings
    engine.bind(buffers(place, 2), batch=2)
    contexts = len(engine._contexts)
    new = {"a": -ONNX["a"], "b": ONNX["b"] + 1}
    stand.calls.clear()
    engine.refit(new, ONNX)
    assert stand.weights == {name: {**ONNX, **new}[name].tobytes() for name in ONNX}
    assert stand.calls == [("refit_cuda_engine",)]
    # Contexts and what they are bound to stay.
    engine.bind(buffers(place, 2), batch=2)
    engine.enqueue()
    assert stand.calls[-1] == ("execute_async_v3", 77)
    assert len(engine._contexts) >= contexts
    # What is not contiguous is copied.
    engine.refit({"a": np.asfortranarray(ONNX["a"])}, ONNX)
    assert stand.weights["a"] == ONNX["a"].tobytes()


def test_refusals(tmp_path: Path) -> None:
    stand = Fitted(RTX)
    engine = opened(stand, Place(), tmp_path, refit=True)
    before = dict(stand.weights)
    cases: list[tuple[dict[str, Any], dict[str, Any], str, type[Exception], str]] = [
        ({"a": ONNX["a"], "z": ONNX["a"]}, ONNX, "", BadEngine, "can't be given 1 of 2 weights, e.g. z"),
        ({"b": ONNX["b"]}, {}, "", BadEngine, "wants 1 further weights .*'c'"),
        ({"a": ONNX["a"][:1]}, ONNX, "", BadEngine, "a of 6 elements in 24 bytes; given are 3 in 12"),
        ({"a": ONNX["a"].astype(np.float16)}, ONNX, "", BadEngine, "given are 6 in 12"),
        ({"a": ONNX["a"]}, ONNX, "set a", BadEngine, "refuses a: the library gave no reason"),
        ({"a": ONNX["a"] + 1}, ONNX, "refit_cuda_engine", FailedWork, "small.plan could not be refitted"),
    ]
    for new, others, refuse, kind, words in cases:
        stand.refuse = {refuse}
        with pytest.raises(kind, match=words):
            engine.refit(new, others)
        assert stand.weights == before


def test_an_engine_built_without_the_option(tmp_path: Path) -> None:
    engine = opened(Fitted(RTX), Place(), tmp_path)
    assert engine.refit_names is None
    with pytest.raises(BadInput, match=r"small.plan was compiled without the option refit") as refused:
        engine.refit({}, {})
    assert "--option refit=true" in refused.value.hint
