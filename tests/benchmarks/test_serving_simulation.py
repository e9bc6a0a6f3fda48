"""``benchmarks/serving_simulation.py``: an engine and its simulation, and a few simulated devices."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from support.tiny import TinyPair


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("serving_simulation")


def test_what_a_check_measured_is_scaled_and_goes_on_where_it_stopped(
    script: ModuleType, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    checked, out = tmp_path / "check.json", tmp_path / "scale.json"
    for words in (["--loads", "1,x"], ["--seconds", "nan"], ["--windows", "0"]):
        assert script.main(["check", str(tiny_pair.bundle), *words]) == 2
    command = ["check", str(tiny_pair.bundle), "--loads", "0.5", "--seconds", "1", "--windows", "1"]
    assert script.main([*command, "--out", str(checked)]) == 0
    (window,) = json.loads(checked.read_text())["windows"]
    assert window["requests"] > 0
    assert window["simulation"]["throughput"] == pytest.approx(window["engine"]["throughput"], rel=0.2)

    def scale(parts: str) -> int:
        few = ["--devices", "4", "--requests", "100", "--check", str(checked), "--out", str(out)]
        return int(script.main(["scale", "--parts", parts, *few]))

    assert scale("load-0.8") == 0
    before = json.loads(out.read_text())["parts"]["load-0.8"]
    assert scale("load-0.8,failure-0.25*,deadline-1.5,wide-FirstCome") == 0
    parts = json.loads(out.read_text())["parts"]
    assert parts.keys() == {"load-0.8", "failure-0.25-load-0.8", "deadline-1.5", "wide-FirstCome"}
    assert parts["load-0.8"] == before
    assert all(part["done"] + part["refused"] + part["failed"] == part["requests"] for part in parts.values())
    assert parts["failure-0.25-load-0.8"]["retried"] > 0
    assert scale("nothing") == 2
    more = ["--devices", "5", "--requests", "100", "--check", str(checked), "--out", str(out)]
    assert script.main(["scale", "--parts", "load-0.8", *more]) == 0  # others than those that are there
    again = json.loads(out.read_text())["parts"]["load-0.8"]
    assert (before["devices"], again["devices"]) == (4, 5)
    assert "--devices=5 --requests=100" in again["command"]
