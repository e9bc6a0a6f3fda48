"""Programs of lanes, and the stepper driven by hand: lanes start in any slot at any time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tstitch_trt import Runtime
from tstitch_trt.runtime.lane_program import LaneProgram, StepKey
from tstitch_trt.runtime.stepper import Stepper

__all__ = ["CLASSES", "run", "solo"]

Array = NDArray[np.float32]

PAINTED: dict[str, Any] = {
    "image": np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8), "mask": np.arange(64).reshape(8, 8) > 30,
}  # fmt: skip
CLASSES: list[dict[str, Any]] = [
    {"labels": [3], "seed": 1, "steps": 9, "solver": "dpmpp-2m", "guidance": 3.0, "fraction": 0.4},
    {"labels": [7], "seed": 2, "steps": 5, "solver": "ddpm", "guidance": {"large": 2.0}, "schedule": "large:2,small"},
    {"labels": [0], "seed": 3, "steps": 12, "solver": "unipc", "guidance": 1.0, "fraction": 0.6},
    {
        "labels": [9],
        "seed": 4,
        "steps": 7,
        "solver": "euler",
        "guidance": 4.0,
        "guidance_rescale": 0.7,
        "fraction": 0.0,
    },
    {"labels": [5], "seed": 5, "steps": 8, "guidance": 2.0, "fraction": 0.5, **PAINTED},
    {"labels": [1], "seed": 6, "steps": 6, "solver": "dpmpp-2m", "fraction": 0.5, "strength": 0.7, **PAINTED},
]


def solo(runtime: Runtime, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[LaneProgram, Array]:
    """The program of a request for one image, and the latents ``[C,H,W]`` that ``sample`` makes of it."""
    seen: list[LaneProgram] = []
    start = runtime._stepper.start

    def noted(first: int, *programs: LaneProgram) -> None:
        seen.extend(programs)
        start(first, *programs)

    with monkeypatch.context() as patched:
        patched.setattr(runtime._stepper, "start", noted)
        latents = runtime.sample(**asked, decode=False).latents
    assert latents is not None
    (program,) = seen
    return program, latents[0]


def run(
    stepper: Stepper, programs: dict[int, LaneProgram], arrivals: dict[int, int], *, alone: bool
) -> dict[int, Array]:
    """Starts each slot's program at its tick; in each tick all lanes make a step, ``alone`` or with those like it."""
    steps: dict[int, int] = {}
    found: dict[int, Array] = {}
    for tick in range(100):
        for slot, when in arrivals.items():
            if when == tick:
                stepper.start(slot, programs[slot])
                steps[slot] = programs[slot].start
        groups: dict[tuple[StepKey, int], list[int]] = {}
        for slot, step in steps.items():
            groups.setdefault((programs[slot].keys[step], slot if alone else 0), []).append(slot)
        for (key, _), slots in groups.items():
            stepper.step(key, slots)
        for slot in [slot for slot in steps if steps[slot] + 1 == len(programs[slot].keys)]:
            del steps[slot]
            found[slot] = stepper._device.download(stepper.arena.lanes(slot, 1, programs[slot].size))[0]
        steps = {slot: step + 1 for slot, step in steps.items()}
        if len(found) == len(programs):
            return found
    raise AssertionError("some lane never finished")
