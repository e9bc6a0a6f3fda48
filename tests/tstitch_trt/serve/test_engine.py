"""The batching engine: every image is the one that ``sample`` draws alone, whatever shared its batches."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.hand_made_parts import World
from support.lanes import CLASSES
from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.errors import Cancelled
from tstitch_trt import Result, Runtime
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.handle import Handle

SECONDS = 30.0
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
TEXTS: list[dict[str, Any]] = [
    {"prompt": "a fox", "steps": 6, "schedule": "plain", "seed": 1, "n": 3},
    {"prompt": ["a red fox", "a blue sky a blue sky"], "steps": 3, "schedule": "plain", "guidance": 4.0, "seed": 2},
    {"prompt": "a sea", "negative_prompt": "blurry", "steps": 9, "solver": "dpmpp-2m", "schedule": "plain",
     "guidance": 2.0, "height": 64, "width": 96, "seed": 3},
    {"prompt": "a bear", "steps": 8, "schedule": "plain", "image": PICTURE, "strength": 0.6, "seed": 4},
    {"prompt": "a bear", "steps": 5, "schedule": "plain:2,painter", "image": PICTURE, "mask": PICTURE[..., 0] > 99,
     "height": 64, "width": 96, "seed": 5},
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return World().bundle(tmp_path_factory.mktemp("world"))


def alone(bundle: Any, asked: list[dict[str, Any]]) -> list[Result]:
    with tstitch_trt.load(bundle, threads=1, verify="size") as runtime:
        return [runtime.sample(**each) for each in asked]


@pytest.fixture(scope="module")
def engine(tiny_pair: TinyPair, world: Bundle) -> Iterator[Engine]:
    with Engine({"classes": tiny_pair.bundle, "texts": world}, max_lanes=5, load={"threads": 1}) as made:
        yield made


@pytest.fixture(scope="module")
def expected(tiny_pair: TinyPair, world: Bundle) -> list[tuple[str, dict[str, Any], Result]]:
    found = [
        ("classes", asked, result) for asked, result in zip(CLASSES, alone(tiny_pair.bundle, CLASSES), strict=True)
    ]
    return found + [("texts", asked, result) for asked, result in zip(TEXTS, alone(world, TEXTS), strict=True)]


def check(got: Result, wanted: Result) -> None:
    assert np.linalg.norm(got.latents - wanted.latents) <= 1e-4 * np.linalg.norm(wanted.latents)
    assert got.images is not None
    assert wanted.images is not None
    assert np.abs(got.images.astype(int) - wanted.images.astype(int)).max() <= 1
    assert (got.seeds, got.labels, got.prompts) == (wanted.seeds, wanted.labels, wanted.prompts)
    assert got.plan.schedule == wanted.plan.schedule
    assert [(part.member, part.steps) for part in got.timings] == [(p.member, p.steps) for p in wanted.timings]


@pytest.mark.parametrize("seed", range(3))
def test_whatever_shares_its_batches_an_image_is_the_one_drawn_alone(
    engine: Engine, expected: list[tuple[str, dict[str, Any], Result]], seed: int
) -> None:
    """Random arrivals from four threads, two bundles, cancels in between."""
    chance = random.Random(seed)
    found: list[tuple[Handle, Result, bool]] = []

    def ask(seed: int) -> None:
        own = random.Random(seed)
        for _ in range(8):
            model, asked, result = own.choice(expected)
            handle = engine.submit(**asked, model=model, priority=own.randrange(3), previews=own.choice([0, 0, 2]))
            cancelled = own.random() < 0.2
            if cancelled:
                threading.Timer(own.random() / 50, handle.cancel).start()
            found.append((handle, result, cancelled))
            if own.random() < 0.5:
                threading.Event().wait(own.random() / 50)

    threads = [threading.Thread(target=ask, args=(chance.randrange(10**6),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle, result, cancelled in found:
        try:
            check(handle.result(SECONDS), result)
        except Cancelled:
            assert cancelled
            assert handle.state == "cancelled"
    state = engine.state()
    assert all(
        model.lanes == model.waiting_images == model.waiting_bytes == model.open == 0 for model in state.models.values()
    )
    assert all(abs(model.backlog_seconds) < 1e-9 for model in state.models.values())


def test_in_the_same_batches_an_image_is_the_same_bit_for_bit(tiny_pair: TinyPair) -> None:
    (wanted,) = alone(tiny_pair.bundle, CLASSES[:1])
    with tstitch_trt.load(tiny_pair.bundle, threads=1) as runtime, Engine(runtime) as engine:
        got = engine.submit(**CLASSES[0]).result(SECONDS)
    np.testing.assert_array_equal(got.latents, wanted.latents)
    np.testing.assert_array_equal(got.images, wanted.images)


def test_the_runtime_is_given_back(tiny_pair: TinyPair) -> None:
    with tstitch_trt.load(tiny_pair.bundle, threads=1) as runtime:
        wanted = runtime.sample(**CLASSES[0]).latents
        with Engine(runtime, max_lanes=64) as engine:
            engine.warm_up()
            got = engine.submit(**CLASSES[0], decode=False).result(SECONDS)
            assert got.images is None
            with pytest.raises(tstitch_trt.Busy):
                runtime.sample(**CLASSES[0], timeout=0)
        np.testing.assert_array_equal(runtime.sample(**CLASSES[0]).latents, wanted)
        assert isinstance(runtime, Runtime)
