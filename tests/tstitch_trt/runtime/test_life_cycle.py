"""The order of a runtime's work: threads, callbacks, iterators that are dropped, and closing at any time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.hand_made_parts import World
from support.tiny import TinyPair
from tstitch_engines.errors import BadInput, Busy, Cancelled, Closed, FailedWork
from tstitch_trt import Runtime
from tstitch_trt.runtime.result import StepEvent
from tstitch_trt.runtime.work_queue import WorkQueue

SECONDS = 30  # a test that waits longer has hung
SHORT: dict[str, Any] = {"labels": [1, 2], "steps": 4, "seed": 3}


@pytest.fixture
def runtime(tiny_pair: TinyPair) -> Iterator[Runtime]:
    loaded = tstitch_trt.load(tiny_pair.bundle, threads=1, verify="size", timeout=SECONDS)
    yield loaded
    loaded.close(cancel=True)  # what a failed test left is not waited for


@pytest.fixture
def other() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


class Gate:
    """A callback that stops a request of another thread after its first step, until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._opened = threading.Event()
        self.steps = 0

    def __call__(self, event: StepEvent) -> None:
        self.steps = event.step
        self.reached.set()
        assert self._opened.wait(SECONDS)

    def open(self) -> None:
        self._opened.set()

    def hold(self, runtime: Runtime, thread: ThreadPoolExecutor, **request: Any) -> Future[Any]:
        running = thread.submit(runtime.sample, callback=self, **{**SHORT, **request})
        assert self.reached.wait(SECONDS)
        return running


# --- threads


def test_every_verb_from_eight_threads_gives_what_it_gives_alone(
    tmp_path_factory: pytest.TempPathFactory, other: ThreadPoolExecutor
) -> None:
    with tstitch_trt.load(World().bundle(tmp_path_factory.mktemp("world")), threads=1) as runtime:
        size = (runtime.manifest.latent.height, runtime.manifest.latent.width)
        latents = np.random.default_rng(0).standard_normal((1, 4, *size)).astype(np.float32)
        pictures = np.random.default_rng(1).uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)
        asked: dict[str, Any] = {"steps": 3, "schedule": "plain", "seed": 5}

        def walked(prompt: str) -> list[np.ndarray]:
            return [event.preview() for event in runtime.iterate(prompt=prompt, **asked)]

        def timed() -> bool:
            return len(runtime.time_member("plain", 1, repeats=1, warmup=0)) == 1

        def kernels() -> bool:
            return len(runtime.time_step_kernels(1, repeats=1, warmup=0)) == 1

        verbs: list[Callable[[], Any]] = [
            lambda: runtime.sample(prompt="a fox", **asked).images,
            lambda: runtime.sample(prompt=["a blue sky", "a fox"], **asked, height=64, width=96).latents,
            lambda: runtime.sample(prompt="a fox", output="device", **asked).device_latents,
            lambda: walked("a red fox"),
            lambda: runtime.decode(latents),
            lambda: runtime.images(latents),
            lambda: runtime.encode(pictures)[0],
            timed,
            kernels,
            lambda: runtime.memory()["arena"],
        ]
        alone = [verb() for verb in verbs]
        order = [index for start in range(8) for index in [*range(start, len(verbs)), *range(start)]]
        calls = [(index, other.submit(verbs[index])) for index in order]
        for index, call in calls:
            np.testing.assert_array_equal(call.result(SECONDS), alone[index], err_msg=str(index))


def test_calls_are_served_in_the_order_of_asking() -> None:
    queue = WorkQueue(lambda: None)
    served: list[int] = []
    threads = []

    def work(number: int) -> None:
        with queue.work():
            served.append(number)

    with queue.turn():
        for number in range(8):
            threads.append(threading.Thread(target=work, args=(number,)))
            threads[-1].start()
            while len(queue._waiting) <= number:
                pass
    for thread in threads:
        thread.join(SECONDS)
    assert served == list(range(8))


def test_a_second_thread_waits_its_turn_or_is_told(runtime: Runtime, other: ThreadPoolExecutor) -> None:
    expected = runtime.sample(**SHORT).latents
    gate = Gate()
    first = gate.hold(runtime, other)
    with pytest.raises(Busy, match=r"busy with other requests for 0\.01 s") as caught:
        runtime.sample(**SHORT, timeout=0.01)
    assert not isinstance(caught.value, BadInput)
    assert caught.value.exit_code == 1
    with pytest.raises(Busy):
        next(runtime.iterate(**SHORT, timeout=0))
    second = other.submit(runtime.sample, **SHORT)
    decoded = other.submit(runtime.decode, expected)
    assert not second.done()
    gate.open()
    for call in (first, second):
        np.testing.assert_array_equal(call.result(SECONDS).latents, expected)
    np.testing.assert_array_equal(decoded.result(SECONDS), runtime.decode(expected))
    with pytest.raises(BadInput, match="timeout = -1"):
        runtime.sample(**SHORT, timeout=-1)


def test_the_timeout_of_a_runtime(tiny_pair: TinyPair, other: ThreadPoolExecutor) -> None:
    with pytest.raises(BadInput, match="timeout = 'long'"):
        tstitch_trt.load(tiny_pair.bundle, timeout="long")  # type: ignore[arg-type]
    with tstitch_trt.load(tiny_pair.bundle, threads=1, verify="size", timeout=0.01) as runtime:
        gate = Gate()
        first = gate.hold(runtime, other)
        zeros = np.zeros((1, 4, 8, 8), np.float32)
        for verb in (lambda: runtime.decode(zeros), lambda: runtime.time_member("small", 1), runtime.restore):
            with pytest.raises(Busy):
                verb()
        waiting = [other.submit(runtime.sample, **SHORT, timeout=wait) for wait in (1e300, float("inf"))]
        gate.open()
        first.result(SECONDS)
        for call in waiting:
            call.result(SECONDS)


# --- the request's own thread


def test_the_callback_uses_its_own_turn(runtime: Runtime) -> None:
    seen: list[np.ndarray] = []

    def callback(event: StepEvent) -> None:
        estimate = event.estimate()
        np.testing.assert_array_equal(event.preview(), runtime.decode(estimate))
        assert runtime.images(estimate).shape == estimate.shape
        seen.append(event.latents())
        for verb in (lambda: runtime.sample(**SHORT), lambda: runtime.time_member("small", 1), runtime.restore):
            with pytest.raises(Busy, match="own request"):
                verb()

    expected = runtime.sample(**SHORT).latents
    np.testing.assert_array_equal(runtime.sample(**SHORT, callback=callback).latents, expected)
    np.testing.assert_array_equal(seen[-1], expected)


def test_a_raising_callback_frees_the_runtime(runtime: Runtime, other: ThreadPoolExecutor) -> None:
    def callback(event: StepEvent) -> None:
        raise ArithmeticError("from the callback")

    held = other.submit(runtime.sample, **SHORT, callback=callback)
    error = held.exception(SECONDS)
    assert isinstance(error, ArithmeticError)  # its traceback holds the frames of sample while it is held here
    runtime.sample(**SHORT, timeout=0)
    with pytest.raises(StopIteration):
        runtime.sample(**SHORT, callback=lambda event: next(iter(())))
    runtime.sample(**SHORT, timeout=0)


def test_an_iterator_that_is_dropped_or_closed_frees_the_runtime(runtime: Runtime) -> None:
    kept = runtime.iterate(**SHORT)
    runtime.sample(**SHORT, timeout=0)  # it has not begun
    next(kept)
    with pytest.raises(Busy, match="own request") as caught:
        runtime.sample(**SHORT)
    assert "close it first" in caught.value.hint
    kept.close()
    runtime.sample(**SHORT, timeout=0)
    dropped = runtime.iterate(**SHORT)
    next(dropped)
    del dropped
    runtime.sample(**SHORT, timeout=0)
    for _ in runtime.iterate(**SHORT):
        break
    runtime.sample(**SHORT, timeout=0)


def test_an_iterator_goes_from_thread_to_thread(runtime: Runtime, other: ThreadPoolExecutor) -> None:
    expected = runtime.sample(**SHORT).latents
    walk = runtime.iterate(**SHORT)
    next(walk)
    event = other.submit(next, walk).result(SECONDS)
    event = other.submit(lambda: next(walk)).result(SECONDS)
    assert event.step == 3
    later = other.submit(lambda: (next(walk).latents(), list(walk))[0])
    np.testing.assert_array_equal(later.result(SECONDS), expected)
    runtime.sample(**SHORT, timeout=0)


def test_an_event_is_read_while_it_is_current(runtime: Runtime, other: ThreadPoolExecutor) -> None:
    walk = runtime.iterate(**SHORT)
    first = next(walk)
    latents = other.submit(first.latents).result(SECONDS)
    np.testing.assert_array_equal(first.latents(), latents)
    second = next(walk)
    for read in (first.latents, first.estimate, first.preview):
        with pytest.raises(BadInput, match="this step is over"):
            read()
    second.latents()
    walk.close()
    with pytest.raises(BadInput, match="this step is over"):
        second.latents()
    third = next(runtime.iterate(**SHORT))
    with pytest.raises(BadInput, match="this step is over"):
        third.latents()  # the iterator was dropped


def test_a_result_on_the_device_is_its_own(runtime: Runtime) -> None:
    first = runtime.sample(**SHORT, output="device").device_latents
    before = first.copy()
    runtime.sample(**{**SHORT, "seed": 8}, output="device")
    np.testing.assert_array_equal(first, before)
    runtime.close()
    np.testing.assert_array_equal(first, before)


# --- closing


def test_close_waits_for_the_running_request(runtime: Runtime, other: ThreadPoolExecutor) -> None:
    expected = runtime.sample(**SHORT).latents
    gate = Gate()
    running = gate.hold(runtime, other)
    waiting = other.submit(runtime.sample, **SHORT)
    closing = [other.submit(runtime.close) for _ in range(2)]
    with pytest.raises(Closed):
        waiting.result(SECONDS)
    assert not any(call.done() for call in closing)
    gate.open()
    np.testing.assert_array_equal(running.result(SECONDS).latents, expected)
    for call in closing:
        call.result(SECONDS)


def test_close_cancels_the_running_request(runtime: Runtime, other: ThreadPoolExecutor) -> None:
    gate = Gate()
    running = gate.hold(runtime, other)
    other.submit(runtime.close, cancel=True).result(SECONDS)
    gate.open()
    with pytest.raises(Cancelled, match="closed while this request ran"):
        running.result(SECONDS)
    assert gate.steps == 1


def test_close_cancels_between_steps_that_nobody_watches(
    runtime: Runtime, other: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is freed under a step that runs."""
    inside, go_on, steps = threading.Event(), threading.Event(), []
    stepping = runtime._stepper.stepping

    def slow(kind: Any) -> Callable[[], None]:
        one = stepping(kind)

        def step() -> None:
            inside.set()
            assert go_on.wait(SECONDS)
            one()
            steps.append(1)

        return step

    monkeypatch.setattr(runtime._stepper, "stepping", slow)
    running = other.submit(runtime.sample, **SHORT)
    assert inside.wait(SECONDS)
    closing = other.submit(runtime.close, cancel=True)
    assert not closing.done()
    go_on.set()
    closing.result(SECONDS)
    with pytest.raises(Cancelled):
        running.result(SECONDS)
    assert len(steps) < 4


def test_close_cancels_an_iterator_that_nobody_goes_on_with(runtime: Runtime, other: ThreadPoolExecutor) -> None:
    walk = runtime.iterate(**SHORT)
    event = next(walk)
    other.submit(runtime.close, cancel=True).result(SECONDS)
    with pytest.raises(Cancelled):
        event.latents()
    with pytest.raises(Cancelled):
        next(walk)


def test_close_in_the_callback_cancels_its_request(runtime: Runtime) -> None:
    def callback(event: StepEvent) -> None:
        runtime.close()
        with pytest.raises(Cancelled):
            event.latents()
        with pytest.raises(Closed):
            runtime.decode(np.zeros((1, 4, 8, 8), np.float32))

    with pytest.raises(Cancelled):
        runtime.sample(**SHORT, callback=callback)
    with pytest.raises(Closed):
        runtime.sample(**SHORT)


def test_close_in_the_middle_of_a_step_is_done_after_it(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal handler calls it, on the thread that samples."""
    stepping = runtime._stepper.stepping
    freed: list[int] = []
    monkeypatch.setattr(runtime, "_free", lambda: freed.append(1))

    def closing(kind: Any) -> Callable[[], None]:
        one = stepping(kind)

        def step() -> None:
            runtime.close()
            assert not freed
            one()

        return step

    with monkeypatch.context() as patched:
        patched.setattr(runtime._stepper, "stepping", closing)
        with pytest.raises(Cancelled):
            runtime.sample(**SHORT)
    assert freed == [1]


def test_after_close_every_verb_says_so(runtime: Runtime) -> None:
    begun, fresh = runtime.iterate(**SHORT), runtime.iterate(**SHORT)
    next(begun)
    runtime.close()
    runtime.close()
    zeros = np.zeros((1, 4, 8, 8), np.float32)
    verbs: dict[str, Callable[[], object]] = {
        "sample": lambda: runtime.sample(**SHORT),
        "iterate": lambda: runtime.iterate(**SHORT),
        "begun before": lambda: next(fresh),
        "decode": lambda: runtime.decode(zeros),
        "images": lambda: runtime.images(zeros),
        "encode": lambda: runtime.encode(np.zeros((1, 3, 64, 64), np.float32)),
        "time_member": lambda: runtime.time_member("small", 1),
        "time_step_kernels": lambda: runtime.time_step_kernels(1),
        "swap_lora": lambda: runtime.swap_lora("small", "style.safetensors"),
        "restore": runtime.restore,
        "lora": lambda: runtime.lora("small", "style.safetensors").__enter__(),
        "memory": runtime.memory,
        "graphs": runtime.graphs,
        "jit_ms": runtime.jit_ms,
    }
    for name, verb in verbs.items():
        with pytest.raises(Closed, match="this runtime is closed"):
            verb()
        assert issubclass(Closed, FailedWork), name
    assert runtime.plan(fraction=0.5).steps == 10  # this needs no engine
    assert runtime.members == ("small", "large")


def test_leaving_the_block_with_an_error_cancels(tiny_pair: TinyPair, other: ThreadPoolExecutor) -> None:
    gate = Gate()
    with (  # noqa: PT012
        pytest.raises(ArithmeticError),
        tstitch_trt.load(tiny_pair.bundle, threads=1, verify="size") as runtime,
    ):
        running = gate.hold(runtime, other)
        raise ArithmeticError
    gate.open()
    with pytest.raises(Cancelled):
        running.result(SECONDS)
