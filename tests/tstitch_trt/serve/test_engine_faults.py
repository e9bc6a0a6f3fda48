"""What goes wrong in a batch stays with the requests it belongs to; nothing is lost and nobody waits for ever."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.hand_made_parts import World
from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.errors import (
    BadInput,
    Busy,
    Cancelled,
    Closed,
    DeviceLost,
    FailedWork,
    NotFinite,
    OutOfTime,
    Overloaded,
    UnknownName,
)
from tstitch_trt import FailedImage, Runtime
from tstitch_trt.runtime.stepper import Stepper
from tstitch_trt.serve import engine as serving
from tstitch_trt.serve.admission import Cheaper
from tstitch_trt.serve.costs import CostPoint
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.observer import Observer, TickInfo

SECONDS = 30.0
ASKED: dict[str, Any] = {"labels": [3], "seed": 1, "steps": 6, "fraction": 0.5, "guidance": 1.0}
LONG: dict[str, Any] = {**ASKED, "steps": 1000}
GOOD = np.random.default_rng(3).standard_normal((4, 6, 9)).astype(np.float32)


@pytest.fixture(scope="module")
def wanted(tiny_pair: TinyPair) -> Any:
    with tstitch_trt.load(tiny_pair.bundle, threads=1, verify="size") as runtime:
        return runtime.sample(**ASKED).latents


@pytest.fixture
def engine(tiny_pair: TinyPair) -> Iterator[Engine]:
    with Engine(tiny_pair.bundle, max_lanes=6, max_queue=8, load={"threads": 1, "verify": "size"}) as made:
        yield made
        with suppress(Busy):
            made.close(cancel=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return World().bundle(tmp_path_factory.mktemp("world"))


def idle(engine: Engine) -> bool:
    """Once nothing of any request is left: no lane, nothing that waits, nothing counted."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        models = engine.state().models.values()
        left = [(m.lanes, m.waiting_images, m.waiting_bytes, m.open, round(m.backlog_seconds, 9)) for m in models]
        if not any(map(any, left)):
            return True
        time.sleep(0.002)
    return False


class Steps:
    """Stands before ``Stepper.step``: ``hook`` is called with the slots of each batch, and may raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hook: Callable[[Any], None]) -> None:
        step = Stepper.step

        def hooked(stepper: Stepper, key: Any, slots: Any) -> None:
            hook(slots)
            step(stepper, key, slots)

        monkeypatch.setattr(Stepper, "step", hooked)


class Gate:
    """Holds the device's thread before its next batch until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        Steps(monkeypatch, self._wait)

    def _wait(self, slots: Any) -> None:
        self.reached.set()
        assert self._open.wait(SECONDS)

    def open(self) -> None:
        self._open.set()


# --- faults


def test_a_lane_that_is_not_finite_fails_alone(world: Bundle) -> None:
    bad = GOOD.copy()
    bad[2] = 3e38
    asked: dict[str, Any] = {"steps": 4, "schedule": "plain", "seeds": [1, 2, 3, 4]}
    with Engine(world, load={"threads": 1}) as engine:
        other = engine.submit(prompt_embeds=GOOD, **asked)
        some = engine.submit(prompt_embeds=bad, partial=True, **asked)
        none = engine.submit(prompt_embeds=bad, **asked)
        want = other.result(SECONDS)
        got = some.result(SECONDS)
        with pytest.raises(NotFinite, match=r"after step 1 of 4, made by member 'plain'") as error:
            none.result(SECONDS)
        assert idle(engine)
    assert error.value.failed == got.failed == (FailedImage(2, 3, 1, "plain"),)
    np.testing.assert_allclose(got.latents[[0, 1, 3]], want.latents[[0, 1, 3]], rtol=1e-4, atol=1e-5)
    assert np.isnan(got.latents[2]).all()
    assert got.images is not None
    assert not got.images[2].any()


def test_an_error_of_an_engine_fails_the_lanes_it_had(
    engine: Engine, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = threading.Event()

    def fail_once(slots: Any) -> None:
        if not first.is_set():
            first.set()
            raise FailedWork("the engine broke", hint="nothing")

    Steps(monkeypatch, fail_once)
    broken = engine.submit(**ASKED)
    with pytest.raises(FailedWork, match="the engine broke"):
        broken.result(SECONDS)
    assert broken.state == "failed"
    np.testing.assert_allclose(engine.submit(**ASKED).result(SECONDS).latents, wanted, rtol=1e-4, atol=1e-5)
    assert idle(engine)


@pytest.mark.parametrize("losses", [1, 2])
def test_after_a_lost_device_what_was_not_answered_begins_again_once(
    engine: Engine, wanted: Any, monkeypatch: pytest.MonkeyPatch, losses: int
) -> None:
    left, before = [losses], engine.runtime()

    def lose(slots: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise DeviceLost("an illegal address", hint="start again")

    Steps(monkeypatch, lose)
    handle = engine.submit(**{**ASKED, "labels": [3, 3], "seeds": [1, 1], "seed": None})
    if losses == 1:
        for latents in handle.result(SECONDS).latents:
            np.testing.assert_allclose(latents, wanted[0], rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(DeviceLost, match="an illegal address"):
            handle.result(SECONDS)
    assert engine.runtime() is not before
    with pytest.raises(Closed):
        before.sample(**ASKED)
    np.testing.assert_allclose(engine.submit(**ASKED).result(SECONDS).latents, wanted, rtol=1e-4, atol=1e-5)
    assert idle(engine)


def test_a_lost_device_of_somebody_elses_runtime_is_the_end(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(slots: Any) -> None:
        raise DeviceLost("an illegal address", hint="start again")

    Steps(monkeypatch, lose)
    with tstitch_trt.load(tiny_pair.bundle, threads=1) as runtime, Engine(runtime) as engine:
        with pytest.raises(FailedWork, match="this process can't use it again"):
            engine.submit(**ASKED).result(SECONDS)
        state = engine.state()
        assert not state.ready
        assert "this process can't use it again" in str(state.failed)
        with pytest.raises(Closed):
            engine.submit(**ASKED)


@pytest.mark.parametrize("running", [True, False])
def test_a_runtime_that_is_closed_under_the_engine_is_the_end(tiny_pair: TinyPair, running: bool) -> None:
    with tstitch_trt.load(tiny_pair.bundle, threads=1) as runtime, Engine(runtime) as engine:
        handle = engine.submit(**LONG) if running else None
        if handle is not None:
            next(handle.progress())
        runtime.close(cancel=True)
        handle = handle or engine.submit(**ASKED)
        with pytest.raises(Closed, match="was closed under the engine"):
            handle.result(SECONDS)
        assert not engine.state().ready


def test_a_decoder_that_is_slow_holds_up_no_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from tstitch_trt.runtime.vae import Vae

    begun, go_on, decode = threading.Event(), threading.Event(), Vae.decode_each

    def slow(vae: Vae, latents: Any, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(SECONDS)
        return decode(vae, latents, **options)

    monkeypatch.setattr(Vae, "decode_each", slow)
    first = engine.submit(**ASKED)
    assert begun.wait(SECONDS)
    second = engine.submit(**ASKED, decode=False)
    assert next(event for event in second.progress() if event.step == ASKED["steps"])
    go_on.set()
    assert first.result(SECONDS).images is not None
    assert second.result(SECONDS).images is None


# --- ends


def test_cancels_and_time_outs_free_lanes_at_the_next_step(engine: Engine, wanted: Any) -> None:
    cancelled, late = engine.submit(**LONG), engine.submit(**LONG, timeout=0.05)
    next(cancelled.progress())
    assert cancelled.cancel()
    assert not cancelled.cancel()
    with pytest.raises(Cancelled):
        cancelled.result(SECONDS)
    with pytest.raises(OutOfTime, match=r"not ended after 0.0"):
        late.result(SECONDS)
    assert (cancelled.state, late.state) == ("cancelled", "failed")
    assert idle(engine)
    np.testing.assert_allclose(engine.submit(**ASKED).result(SECONDS).latents, wanted, rtol=1e-4, atol=1e-5)


def test_what_has_ended_is_kept_by_nobody_though_its_time_out_is_far(engine: Engine) -> None:
    gc.disable()
    try:
        handles = [weakref.ref(engine.submit(**ASKED, timeout=SECONDS)) for _ in range(4)]
        assert idle(engine)
        engine.submit(**ASKED).result(SECONDS)  # threads keep their last one
        until = time.monotonic() + SECONDS
        while any(handle() for handle in handles) and time.monotonic() < until:
            time.sleep(0.002)
        assert not any(handle() for handle in handles)
    finally:
        gc.enable()


def test_closing_draws_what_was_accepted_or_cancels_it(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    engine = Engine(tiny_pair.bundle, load={"threads": 1})
    accepted = engine.submit(**ASKED)
    assert gate.reached.wait(SECONDS)
    with pytest.raises(Busy, match=r"1 requests have not ended after 0.01 s"):
        engine.close(timeout=0.01)
    with pytest.raises(Closed, match="takes no requests any more"):
        engine.submit(**ASKED)
    gate.open()
    engine.close()
    assert accepted.result(0).images is not None
    engine = Engine(tiny_pair.bundle, load={"threads": 1})
    handle = engine.submit(**LONG)
    engine.close(cancel=True)
    with pytest.raises(Closed):
        handle.result(0)
    engine.close()


def test_the_interpreter_ends_with_an_engine_at_work(tiny_pair: TinyPair) -> None:
    script = f"""
from tstitch_trt.serve import engine as serving
from tstitch_trt.serve.engine import Engine
engine = Engine({str(tiny_pair.bundle)!r}, load={{"threads": 1}})
handles = [engine.submit(labels=[1], steps=1000) for _ in range(8)]
next(handles[0].progress())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_fork_says_that_it_has_no_engine(engine: Engine) -> None:
    engine.submit(**LONG)
    child = os.fork()
    if child == 0:
        try:
            engine.submit(**ASKED)
        except FailedWork as error:
            engine.close()
            os._exit(0 if "is a fork" in error.message else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


# --- admission


def test_the_queue_keeps_its_bound_whoever_asks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, refused, waiting = Gate(monkeypatch), [], []

    def ask(_: int) -> None:
        try:
            engine.submit(**ASKED)
        except Overloaded as error:
            refused.append(error)
        waiting.append(engine.state().models["tiny"].waiting_images)

    engine.submit(**ASKED)
    assert gate.reached.wait(SECONDS)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(40)))
    assert len(refused) == 40 - 8 - 5  # five lanes are free, but who holds the device can't give them out
    assert max(waiting) <= 8 + 5
    assert all(error.retry_after is not None and error.retry_after >= 0 for error in refused)
    gate.open()
    assert idle(engine)
    with pytest.raises(BadInput, match="9 images in one request; allowed are 8"):
        engine.submit(**{**ASKED, "labels": list(range(9))})


COSTS = [
    CostPoint(name, False, (8, 8), batch, ms / 1e3)
    for name, ms in (("small", 100), ("large", 1000))
    for batch in (1, 8)
]


def test_a_latency_budget_is_kept_or_refused_and_the_schedule_may_give_way(tiny_pair: TinyPair) -> None:
    """Costs are those of the calibration, since nothing runs before the engine is asked."""
    options: dict[str, Any] = {"calibration": lambda runtime: COSTS, "load": {"threads": 1, "verify": "size"}}
    plain = {key: value for key, value in ASKED.items() if key != "fraction"} | {"steps": 10, "fraction": 0.2}
    with Engine(tiny_pair.bundle, **options) as engine:
        with pytest.raises(Overloaded, match="the latency budget is 4 s") as error:
            engine.submit(**plain, latency_budget_ms=4000)
        assert error.value.retry_after is None  # 8 steps of 1 s never fit
        handle = engine.submit(**plain, latency_budget_ms=20_000)
        assert 8 < handle.estimate < 20
        assert handle.adapted is None
        handle.result(SECONDS)
    with Engine(tiny_pair.bundle, **options, cheaper=Cheaper(max_fraction=0.8, min_steps=8)) as engine:
        handle = engine.submit(**plain, latency_budget_ms=5000)
        assert handle.adapted is not None
        assert handle.adapted.startswith("fraction 0.2 -> 0.")
        assert handle.plan.schedule.names.count("small") > 2
        handle.result(SECONDS)
        with pytest.raises(Overloaded):
            engine.submit(**plain, latency_budget_ms=1000)
        with pytest.raises(Overloaded):  # a schedule that was said is not changed
            engine.submit(**{**plain, "fraction": None}, schedule="large", latency_budget_ms=5000)


# --- several bundles, and their change


class Seen(Observer):
    def __init__(self) -> None:
        self.ticks: list[TickInfo] = []

    def ticked(self, tick: TickInfo) -> None:
        self.ticks.append(tick)
        if len(self.ticks) == 1:
            raise RuntimeError("an observer's fault is its own")


def test_bundles_share_the_device_by_weight(tiny_pair: TinyPair) -> None:
    seen = Seen()
    bundles = {"a": tiny_pair.bundle, "b": tiny_pair.bundle}
    options: dict[str, Any] = {"weights": {"a": 3.0}, "observer": seen, "load": {"threads": 1, "verify": "size"}}
    with Engine(bundles, **options) as engine:
        handles = [engine.submit(**{**ASKED, "steps": 1000}, model=model) for model in ("b", "a") for _ in range(2)]
        handles[-1].result(SECONDS)
        ticks = seen.ticks[[tick.model for tick in seen.ticks].index("a") :]
        both = {model: sum(tick.seconds for tick in ticks if tick.model == model) for model in bundles}
        for handle in handles:
            handle.cancel()
    assert 2 < both["a"] / both["b"] < 4.5  # 3, but for what a step too long for either shifts; unweighted it were 1
    with pytest.raises(UnknownName):
        Engine(bundles, weights={"c": 1.0})


def test_a_bundle_is_replaced_between_requests(engine: Engine, tiny_pair: TinyPair, wanted: Any) -> None:
    old = engine.runtime()
    running = engine.submit(**{**ASKED, "steps": 300})
    next(running.progress())
    with pytest.raises(BadInput):
        engine.replace(None, "no.bundle")
    assert engine.runtime() is old
    engine.replace(None, tiny_pair.bundle)
    assert engine.runtime() is not old
    np.testing.assert_allclose(engine.submit(**ASKED).result(SECONDS).latents, wanted, rtol=1e-4, atol=1e-5)
    assert running.result(SECONDS).latents.shape == wanted.shape
    assert idle(engine)
    engine.drain()
    with pytest.raises(Closed):  # before it is loaded
        engine.replace(None, "no.bundle")
    engine.close()
    with pytest.raises(Closed):
        old.sample(**ASKED)


def test_a_request_that_comes_while_its_bundle_is_replaced_is_drawn_by_the_new_one(
    engine: Engine, tiny_pair: TinyPair, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one has no requests and leaves, between the look at what is served and the acceptance."""
    offer, asked = Engine._offer, []

    def replaced_meanwhile(self: Engine, model: Any, job: Any) -> Any:
        asked.append(model)
        if len(asked) == 1:
            engine.replace(None, tiny_pair.bundle)
        return offer(self, model, job)

    monkeypatch.setattr(Engine, "_offer", replaced_meanwhile)
    np.testing.assert_allclose(engine.submit(**ASKED).result(SECONDS).latents, wanted, rtol=1e-4, atol=1e-5)
    assert len(set(map(id, asked))) == 2
    assert idle(engine)


def test_a_replacement_that_can_not_run_is_closed_and_the_old_one_goes_on(
    engine: Engine, tiny_pair: TinyPair, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Runtime] = []
    load = serving.load_runtime

    def noted(source: Any, **options: Any) -> Runtime:
        loaded.append(load(source, **options))
        return loaded[-1]

    def fail(slots: Any) -> None:
        raise FailedWork("the engine broke", hint="nothing")

    monkeypatch.setattr(serving, "load_runtime", noted)
    with monkeypatch.context() as broken:
        Steps(broken, fail)
        with pytest.raises(FailedWork, match="the engine broke"):
            engine.replace(None, tiny_pair.bundle)
    with pytest.raises(Closed):
        loaded[0].sample(**ASKED)
    np.testing.assert_allclose(engine.submit(**ASKED).result(SECONDS).latents, wanted, rtol=1e-4, atol=1e-5)
    assert idle(engine)


def test_a_swap_of_adapters_waits_for_requests_and_holds_back_new_ones(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(Runtime, "swap_lora", lambda runtime, name, files: order.append(f"swap {name}"))
    gate = Gate(monkeypatch)
    before = engine.submit(**ASKED)
    before.add_done_callback(lambda handle: order.append("before"))
    assert gate.reached.wait(SECONDS)
    with pytest.raises(Busy):
        engine.swap_lora("large", "style.safetensors", timeout=0.01)
    swap = threading.Thread(target=engine.swap_lora, args=("large", "style.safetensors"))
    swap.start()
    while not engine._book.models["tiny"].holding:
        time.sleep(0.001)
    after = engine.submit(**ASKED)
    after.add_done_callback(lambda handle: order.append("after"))
    gate.open()
    swap.join(SECONDS)
    after.result(SECONDS)
    assert order == ["before", "swap large", "after"]


def test_a_swap_that_the_engines_refuse_is_an_error_of_the_caller(engine: Engine, wanted: Any) -> None:
    with pytest.raises(BadInput):
        engine.swap_lora("large", "style.safetensors")
    np.testing.assert_allclose(engine.submit(**ASKED).result(SECONDS).latents, wanted, rtol=1e-4, atol=1e-5)


# --- handles


def test_handles_in_an_event_loop(engine: Engine, tiny_pair: TinyPair) -> None:
    with tstitch_trt.load(tiny_pair.bundle, threads=1) as runtime:
        estimates = {event.step: event.preview() for event in runtime.iterate(**ASKED)}

    async def main() -> None:
        handle = engine.submit(**ASKED, previews=2)
        events = [event async for event in handle]
        assert {event.step for event in events} <= set(range(1, 7))
        previews = {event.step: event.preview for event in events if event.preview is not None}
        assert sorted(previews) == [2, 4]
        for step, preview in previews.items():
            assert np.abs(preview.astype(int) - estimates[step][0].astype(int)).max() <= 1
        result = await handle
        assert result is handle.result(0)
        assert handle.times.total >= handle.times.denoise > 0
        long = engine.submit(**LONG)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(long, 0.02)
        assert long.state == "cancelled"
        other = engine.submit(**LONG)
        asyncio.get_running_loop().call_later(0.02, other.cancel)
        with pytest.raises(Cancelled):
            await other

    asyncio.run(main())
    assert idle(engine)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"labels": [99]}, BadInput),
        ({"labels": [1], "step": 3}, UnknownName),
        ({"labels": [1], "model": "other"}, UnknownName),
        ({"labels": [1], "priority": 1000}, BadInput),
        ({"labels": [1], "previews": -1}, BadInput),
        ({"labels": [1], "latency_budget_ms": 0}, BadInput),
        ({"prompt": "a fox"}, BadInput),
    ],
)
def test_what_can_not_be_right_is_refused_at_once(engine: Engine, asked: dict[str, Any], error: type) -> None:
    with pytest.raises(error):
        engine.submit(**asked)
    assert idle(engine)
