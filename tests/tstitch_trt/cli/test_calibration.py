"""What a served bundle's calibration does: batches end where the cost per image stops falling."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.studies import calibration, step_cost
from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_trt.cli._calibration import calibrated_steps
from tstitch_trt.serve import Engine, Observer, TickInfo
from tstitch_trt.study.budget.conditions import Conditions, engine_digests
from tstitch_trt.study.store import save_study, weights_of


class Largest(Observer):
    """The largest batch of each member."""

    def __init__(self) -> None:
        self.lanes: dict[str, int] = {}

    def ticked(self, tick: TickInfo) -> None:
        self.lanes[tick.member] = max(tick.lanes, self.lanes.get(tick.member, 0))


def largest(bundle: Path) -> dict[str, int]:
    seen, load = Largest(), {"threads": 1, "verify": "size"}
    with Engine(bundle, calibration=calibrated_steps, observer=seen, load=load, max_lanes=16) as engine:
        engine.submit(labels=list(range(10)), steps=4, fraction=0.5, guidance=1.0).result(30)
    return seen.lanes


def test_batches_are_capped_by_the_calibration_that_holds_here(
    tiny_pair: TinyPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One image of the large member costs as much alone as among eight; of the small one an eighth."""
    path = tmp_path / "tiny.bundle"
    shutil.copytree(tiny_pair.bundle, path)
    with caplog.at_level(logging.INFO):
        assert largest(path) == {"small": 4, "large": 4}  # what the engines were tuned for
    assert "has no calibration" in caplog.text
    assert "tstitch-trt calibrate" in caplog.text
    bundle = open_bundle(path)
    costs: dict[str, Any] = {"small": lambda batch: 10.0, "large": lambda batch: 10.0 * batch}
    steps = tuple(step_cost(name, batch, cost(batch)) for name, cost in costs.items() for batch in (1, 2, 4, 8, 16))
    engines = engine_digests(bundle, "onnxruntime", "cpu")
    found = calibration(weights=weights_of(bundle.manifest), engines=engines, steps=steps)
    save_study(bundle, found, key=Conditions.of(found).key)
    assert largest(path) == {"small": 8, "large": 1}
