"""What a server does with a runtime's parts: many requests encoded in few calls, lanes run by hand, its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.hand_made_parts import World
from tstitch_engines.errors import Closed, FailedWork, NotFinite
from tstitch_trt import Runtime
from tstitch_trt.request.options import SampleOptions
from tstitch_trt.runtime.component import Component
from tstitch_trt.runtime.lane_runner import LaneRunner
from tstitch_trt.runtime.stepper import STEP_KEYS

PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
ASKED: list[dict[str, Any]] = [
    {"prompt": "a fox", "steps": 3, "schedule": "plain"},
    {"prompt": ["a red fox", "a blue sky a blue sky"], "steps": 3, "schedule": "plain", "guidance": 4.0},
    {"prompt": "a bear", "negative_prompt": "blurry", "guidance": 2.0, "steps": 4, "schedule": "plain",
     "image": PICTURE, "strength": 0.5, "seed": 3},
    {"prompt": "a sea", "steps": 4, "schedule": "painter", "image": PICTURE[::-1], "mask": PICTURE[..., 0] > 99},
    {"prompt": "a fox", "steps": 4, "schedule": "plain", "image": PICTURE[:, :64], "strength": 0.5},
]  # fmt: skip


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with tstitch_trt.load(World().bundle(tmp_path_factory.mktemp("world")), threads=1) as loaded:
        yield loaded


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of each part's engine."""
    counted: Counter[str] = Counter()
    run = Component._run

    def noted(part: Component, *args: Any) -> Any:
        counted[part.name] += 1
        return run(part, *args)

    monkeypatch.setattr(Component, "_run", noted)
    return counted


def encoded(runner: LaneRunner, asked: list[dict[str, Any]]) -> list[Any]:
    return runner.encode([runner.job(SampleOptions.from_keywords(each)) for each in asked])


def test_requests_are_encoded_together_as_each_is_alone(runtime: Runtime, calls: Counter[str]) -> None:
    with runtime.lanes() as runner:
        alone = [encoded(runner, [each])[0] for each in ASKED]
        apart = calls.copy()
        calls.clear()
        together = encoded(runner, ASKED)
    assert apart["text_encoder"] == 5
    assert calls["text_encoder"] <= 3  # ten chunks, of which an engine takes four at once
    assert apart["vae_encoder"] == 4  # the painter's picture twice: as it is, and with grey inside the mask
    assert calls["vae_encoder"] == 3  # of two sizes, and the one with the mask when the one without it is there
    for got, wanted in zip(together, alone, strict=True):
        for name, inputs in wanted.conditioning.networks.items():
            for key, values in inputs.items():
                for image in range(wanted.n):
                    for half, other in zip(
                        got.conditioning.networks[name][key].row(image), values.row(image), strict=True
                    ):
                        np.testing.assert_allclose(half, other, rtol=1e-5, atol=1e-6)
        if wanted.latents is not None:
            np.testing.assert_allclose(got.latents, wanted.latents, rtol=1e-5, atol=1e-6)


def test_one_that_can_not_be_encoded_fails_alone(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Component._run

    def bad(part: Component, inputs: Any, sizes: Any) -> Any:
        found = run(part, inputs, sizes)
        if part.name == "vae_encoder" and (inputs["image"][:, :, 0, 0] > 0.99).all(axis=1).any():
            found["mean"][:] = np.nan
        return found

    monkeypatch.setattr(Component, "_run", bad)
    white = {**ASKED[2], "image": np.full_like(PICTURE, 255)}
    with runtime.lanes() as runner:
        first, second, third = encoded(runner, [ASKED[2], white, ASKED[0]])
    assert isinstance(second, NotFinite)
    assert first.n == third.n == 1


def test_an_end_waits_for_no_lane_and_nothing_runs_after_it(runtime: Runtime) -> None:
    wanted = runtime.sample(**ASKED[0]).latents
    with runtime.lanes(9) as runner:
        job = runner.job(SampleOptions.from_keywords(ASKED[0]))
        (request,) = runner.encode([job])
        assert not isinstance(request, Exception)
        (program,) = runner.programs(job, request)
        assert runner.slots == 9
        runner.start(7, program)
        for key in program.keys:
            runner.step(key, [7])
        (answer,) = runner.answers([(7, job.parsed.size)])
        latents, fault = runner.fetch(answer)
        np.testing.assert_array_equal(latents, wanted)
        assert fault == -1
        assert runtime._stepper.most_keys > STEP_KEYS
    for call in (lambda: runner.encode([job]), lambda: runner.decode(latents), lambda: runner.fetch(answer)):
        with pytest.raises(Closed):
            call()
    assert runtime._stepper.most_keys == STEP_KEYS
    np.testing.assert_array_equal(runtime.sample(**ASKED[0]).latents, wanted)


def test_closing_the_runtime_ends_the_block(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> None:
    with tstitch_trt.load(runtime.bundle, threads=1) as own, own.lanes() as runner:
        job = runner.job(SampleOptions.from_keywords(ASKED[0]))
        own.close()
        with pytest.raises(Closed):
            runner.encode([job])
        with pytest.raises(FailedWork):
            runner.answers([(0, job.parsed.size)])
