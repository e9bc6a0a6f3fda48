"""Lanes through the stepper alone: started in any slot at any time, each gives the image of its own request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tstitch_trt
from support.hand_made_parts import World
from support.tiny import TinyPair
from tstitch_trt import Runtime
from tstitch_trt.runtime.lane_program import LaneProgram, StepKey
from tstitch_trt.runtime.stepper import Stepper

Array = NDArray[np.float32]

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
]
_SMALL = {"height": 32, "width": 48}
TEXTS: list[dict[str, Any]] = [
    {"prompt": "a red fox", "seed": 1, "steps": 6, "guidance": 3.0, "schedule": "plain", **_SMALL},
    {"prompt": "a bear", "seed": 2, "steps": 4, "solver": "euler", "schedule": "plain", "height": 64, "width": 64},
    {"prompt": "blurry sky sea", "seed": 3, "steps": 5, "guidance": 2.0, "schedule": "steered", **_SMALL},
    {"prompt": "sea", "seed": 4, "steps": 5, "guidance": 2.0, "schedule": "plain:0.5,steered", **_SMALL},
]


@pytest.fixture(scope="module")
def classes(tiny_pair: TinyPair) -> Iterator[Runtime]:
    with tstitch_trt.load(tiny_pair.bundle, threads=2) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with tstitch_trt.load(World().bundle(tmp_path_factory.mktemp("texts")).root, threads=1) as runtime:
        yield runtime


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


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("kind", "requests"), [("classes", CLASSES), ("texts", TEXTS)])
def test_lanes_in_mid_flight_give_their_own_images(
    kind: str, requests: list[dict[str, Any]], alone: bool, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Other solvers, step counts, schedules, guidance, conditioning and latent sizes side by side.

    In batches of the same size the images are equal bit for bit. The first slot is used a second time.
    """
    runtime: Runtime = request.getfixturevalue(kind)
    made = [solo(runtime, asked, monkeypatch) for asked in requests]
    slots = dict(zip((2, 0, 3, 1), made, strict=True))
    programs = {slot: program for slot, (program, _) in slots.items()}
    for first in (0, 2):
        arrivals = {slot: first + 2 * index for index, slot in enumerate(programs)}
        found = run(runtime._stepper, programs, arrivals, alone=alone)
        for slot, (_, want) in slots.items():
            if alone:
                np.testing.assert_array_equal(found[slot], want)
            else:
                assert np.abs(found[slot] - want).max() < 1e-4 * np.abs(want).max()


def test_writing_a_slot_touches_no_other(classes: Runtime, texts: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes of the arena, whatever they were, but those of the slot."""
    rng = np.random.default_rng(0)
    for runtime, requests in ((classes, CLASSES), (texts, TEXTS)):
        stepper = runtime._stepper
        arena = stepper.arena
        for asked in requests:
            program, _ = solo(runtime, asked, monkeypatch)
            slot = int(rng.integers(arena.slots))
            before = {}
            for name, axis, array in _arrays(stepper):
                raw = _raw(array, axis)
                raw[...] = rng.integers(0, 256, raw.shape, np.uint8)
                before[name] = np.delete(raw, slot, axis=axis)
            stepper.start(slot, program)
            for name, axis, array in _arrays(stepper):
                np.testing.assert_array_equal(np.delete(_raw(array, axis), slot, axis=axis), before[name])
            for name, _, array in _arrays(stepper):
                if name in ("step", "fault"):
                    assert array[slot] == (program.start if name == "step" else -1)


def _arrays(stepper: Stepper) -> list[tuple[str, int, NDArray[Any]]]:
    """The host arrays of an arena, each with the axis of its slots."""
    buffers: list[Any] = [
        (name, 1 if name == "history" else 0, buffer) for name, buffer in stepper.arena.buffers.items()
    ]
    buffers += [(name, 1, buffer) for name, buffer in stepper.arena.conditioning.items()]
    return [(name, axis, buffer.array) for name, axis, buffer in buffers]


def _raw(array: NDArray[Any], axis: int) -> NDArray[np.uint8]:
    """The bytes of an array behind its axis of slots."""
    return array.reshape(*array.shape[: axis + 1], -1).view(np.uint8)


def test_a_step_of_some_slots_leaves_the_others(classes: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three lanes fill a bucket of four; the spare position is no slot, not even one that nobody uses."""
    stepper = classes._stepper
    programs = [solo(classes, CLASSES[0] | {"seed": seed}, monkeypatch)[0] for seed in range(5)]
    for slot, program in enumerate(programs):
        stepper.start(slot, program)
    before = {name: array.copy() for name, _, array in _arrays(stepper)}
    stepper.step(programs[0].keys[0]._replace(lanes=4), [4, 0, 2])
    for name, axis, array in _arrays(stepper):
        others = [slot for slot in range(array.shape[axis]) if slot not in (4, 0, 2)]
        np.testing.assert_array_equal(array.take(others, axis), before[name].take(others, axis))
    np.testing.assert_array_equal(stepper.arena.buffers.step.array[:5], [1, 0, 1, 0, 1])  # type: ignore[attr-defined]
