"""Lanes through the stepper alone: started in any slot at any time, each gives the image of its own request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tstitch_trt
from support.hand_made_parts import World
from support.lanes import CLASSES, run, solo
from support.tiny import TinyPair
from tstitch_trt import Runtime
from tstitch_trt.runtime.stepper import Stepper

_SMALL = {"height": 32, "width": 48}
TEXTS: list[dict[str, Any]] = [
    {"prompt": "a red fox", "seed": 1, "steps": 6, "guidance": 3.0, "schedule": "plain", **_SMALL},
    {"prompt": "a bear", "seed": 2, "steps": 4, "solver": "euler", "schedule": "plain", "height": 64, "width": 64},
    {"prompt": "blurry sky sea", "seed": 3, "steps": 5, "guidance": 2.0, "schedule": "steered", **_SMALL},
    {"prompt": "sea", "seed": 4, "steps": 5, "guidance": 2.0, "schedule": "plain:0.5,steered", **_SMALL},
]


@pytest.fixture(scope="module")
def classes(tiny_pair: TinyPair) -> Iterator[Runtime]:
    with tstitch_trt.load(tiny_pair.bundle, threads=1) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with tstitch_trt.load(World().bundle(tmp_path_factory.mktemp("texts")).root, threads=1) as runtime:
        yield runtime


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
    slots = dict(zip((2, 0, 3, 1, 6, 4)[: len(made)], made, strict=True))
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
    arena = stepper.arena
    every = arena.buffers if arena._inpainting is None else arena._inpainting
    buffers: list[Any] = [(name, 1 if name == "history" else 0, buffer) for name, buffer in every.items()]
    buffers += [(name, 1, buffer) for name, buffer in arena.conditioning.items()]
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
