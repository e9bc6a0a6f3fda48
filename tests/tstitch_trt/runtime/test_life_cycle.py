"""The order of a runtime's work: threads, callbacks, iterators that are dropped, and closing at any time."""

from __future__ import annotations

import ctypes
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.hand_made_parts import World
from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.device.host import HostDevice
from tstitch_engines.device.recording import RECORDING
from tstitch_engines.errors import BadInput, Busy, Cancelled, Closed, FailedWork, TStitchError
from tstitch_trt import Runtime
from tstitch_trt.runtime.result import Result, StepEvent
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
        running = thread.submit(runtime.sample, callback=self, **(request or SHORT))
        assert self.reached.wait(SECONDS)
        return running


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return World().bundle(tmp_path_factory.mktemp("world"))


ASKED: dict[str, Any] = {"prompt": "a fox", "steps": 3, "schedule": "plain", "seed": 5}


def calls_of(runtime: Runtime) -> dict[str, Callable[..., Any]]:
    """A call of every public verb and property, which takes ``timeout=`` if the verb does.

    What depends on a clock is left out of what they return.
    """
    size = (runtime.manifest.latent.height, runtime.manifest.latent.width)
    latents = np.random.default_rng(0).standard_normal((1, 4, *size)).astype(np.float32)
    pictures = np.random.default_rng(1).uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)

    def walked(**more: Any) -> list[np.ndarray]:
        return [event.preview() for event in runtime.iterate(**{**ASKED, "prompt": "a red fox"}, **more)]

    def in_block(block: Callable[..., Any], *args: Any, **more: Any) -> np.ndarray:
        with block(*args, **more):
            return runtime.sample(**{**ASKED, "prompt": "a bear"}).images

    calls: dict[str, Callable[..., Any]] = {
        "sample": lambda **more: runtime.sample(**ASKED, **more).images,
        "sample many": lambda **more: (
            runtime.sample(**{**ASKED, "prompt": ["a blue sky", "a fox"] * 3}, height=64, width=96, **more).latents
        ),
        "sample on the device": lambda **more: runtime.sample(**ASKED, output="device", **more).device_latents,
        "iterate": walked,
        "decode": lambda **more: runtime.decode(latents, **more),
        "images": lambda **more: runtime.images(latents, **more),
        "encode": lambda **more: runtime.encode(pictures, **more)[0],
        "time_member": lambda **more: len(runtime.time_member("plain", 1, repeats=2, warmup=0, **more)),
        "time_step_kernels": lambda **more: len(runtime.time_step_kernels(1, repeats=2, warmup=0, **more)),
        "swap_lora": lambda **more: runtime.swap_lora("plain", "style.safetensors", **more),
        "restore": lambda **more: runtime.restore(**more),
        "lora": lambda **more: in_block(runtime.lora, "plain", "style.safetensors", **more),
        "exclusive": lambda **more: in_block(runtime.exclusive, **more),
        "lanes": lambda **more: in_block(runtime.lanes, **more),
        "plan": lambda: runtime.plan(steps=3).rows,
        "within_budget": lambda: runtime.within_budget(100.0, prompt="a fox"),
        "prompt_length": lambda: runtime.prompt_length("a fox"),
        "memory": runtime.memory,
        "jit_ms": runtime.jit_ms,
        "graphs": runtime.graphs,
    }
    public = [name for name in dir(runtime) if not name.startswith("_")]
    calls |= {name: partial(getattr, runtime, name) for name in public if not callable(getattr(runtime, name))}
    assert {name.split(" ")[0] for name in calls} | {"close"} == set(public), "a verb or property without a place here"
    return calls


def result_of(walk: Generator[StepEvent, None, Result]) -> Result:
    while True:
        try:
            next(walk)
        except StopIteration as stop:
            found: Result = stop.value
            return found


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except TStitchError as error:
        return type(error), str(error)


# --- threads


def test_every_verb_from_eight_threads_gives_what_it_gives_alone(world: Bundle, other: ThreadPoolExecutor) -> None:
    with tstitch_trt.load(world, threads=1) as runtime, tstitch_trt.load(world, threads=1) as second:
        calls = [*calls_of(runtime).items(), *calls_of(second).items()]
        alone = [outcome(call) for _ in range(2) for _, call in calls][len(calls) :]  # buffers are made in the first
        order = [index for start in range(8) for index in [*range(start, len(calls)), *range(start)]]
        running = [(index, other.submit(outcome, calls[index][1])) for index in order]
        for index, call in running:
            np.testing.assert_equal(call.result(SECONDS), alone[index], err_msg=calls[index][0])


def test_every_verb_that_waits_can_be_told_how_long(world: Bundle, other: ThreadPoolExecutor) -> None:
    with tstitch_trt.load(world, threads=1) as runtime:
        calls = calls_of(runtime)
        outcomes = {name: outcome(call) for name, call in calls.items()}
        gate = Gate()
        first = gate.hold(runtime, other, **ASKED)
        for name, call in calls.items():
            verb = getattr(Runtime, name.split(" ")[0], None)
            if callable(verb) and "timeout" in inspect.signature(verb).parameters:
                with pytest.raises(Busy, match=r"busy with other requests for 0 s"):
                    call(timeout=0)
            else:  # it waits for nobody
                np.testing.assert_equal(other.submit(outcome, call).result(SECONDS), outcomes[name], err_msg=name)
        with pytest.raises(Busy, match=r"a request still runs after 0.01 s"):
            runtime.close(timeout=0.01)
        with pytest.raises(Closed):
            runtime.sample(**ASKED)
        gate.open()
        first.result(SECONDS)


def test_an_exclusive_block_is_one_threads_own(runtime: Runtime, other: ThreadPoolExecutor) -> None:
    expected = runtime.sample(**SHORT).latents
    with runtime.exclusive(), runtime.exclusive():
        np.testing.assert_array_equal(runtime.sample(**SHORT).latents, expected)
        waiting = other.submit(runtime.sample, **SHORT)
        with pytest.raises(Busy, match="busy with other requests"):
            other.submit(runtime.decode, expected, timeout=0).result(SECONDS)
        runtime.decode(expected)
        walk = runtime.iterate(**SHORT)
        event = next(walk)
        with pytest.raises(Busy, match="own request"):
            runtime.sample(**SHORT)
        assert not waiting.done()
    np.testing.assert_array_equal(waiting.result(SECONDS).latents, expected)
    for call in (event.latents, partial(next, walk)):
        with pytest.raises(Cancelled, match="the block that this request was begun in has ended"):
            call()
    with runtime.exclusive():
        runtime.close()
        with pytest.raises(Closed):
            runtime.sample(**SHORT)


def test_arrays_that_were_given_may_change(world: Bundle, other: ThreadPoolExecutor) -> None:
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((1, 4, 8, 8)).astype(np.float32)
    requests: list[dict[str, Any]] = [
        {"latents": noise.copy()},
        {"image": rng.integers(0, 255, (1, 64, 64, 3), np.uint8), "mask": rng.uniform(0, 1, (64, 64)), "seed": 1},
        {"image": noise.copy(), "strength": 0.5},
        {"control": rng.uniform(0, 1, (1, 3, 64, 64)).astype(np.float32), "schedule": "steered"},
        {"control": rng.integers(0, 255, (64, 64, 3), np.uint8), "schedule": "steered"},
        {"prompt": None, "prompt_embeds": rng.standard_normal((1, 6, 9)).astype(np.float32)},
    ]
    with tstitch_trt.load(world, threads=1, timeout=SECONDS) as runtime:
        for request in requests:
            asked = {"prompt": "a fox", "steps": 4, "schedule": "plain", **request}
            expected = runtime.sample(**asked).latents
            walk = runtime.iterate(**asked)
            for given in request.values():
                if isinstance(given, np.ndarray):
                    given[...] = 0
            np.testing.assert_array_equal(result_of(walk).latents, expected, err_msg=str(list(request)))
        pictures = rng.uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)
        for verb, given in ((runtime.decode, noise), (runtime.images, noise), (runtime.encode, pictures)):
            array, alone, gate = given.copy(), verb(given), Gate()
            first = gate.hold(runtime, other, **ASKED)
            waiting = other.submit(verb, array)
            while not runtime._queue._waiting:
                pass
            array[...] = 0
            gate.open()
            np.testing.assert_equal(waiting.result(SECONDS), alone)
            first.result(SECONDS)


def test_calls_are_served_in_the_order_of_asking() -> None:
    queue = WorkQueue(HostDevice())
    served: list[int] = []
    threads = []

    with queue.exclusive():
        for number in range(8):
            threads.append(threading.Thread(target=queue.do, args=(partial(served.append, number),)))
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


def test_an_iterator_in_the_hands_of_the_garbage_collector_frees_the_runtime(
    runtime: Runtime, other: ThreadPoolExecutor
) -> None:
    walk = runtime.iterate(**SHORT)
    next(walk)
    circle: list[Any] = [walk]
    circle.append(circle)
    del walk, circle
    waiting = other.submit(runtime.sample, **SHORT)
    other.submit(gc.collect).result(SECONDS)
    waiting.result(SECONDS)


def test_an_iterator_that_another_thread_is_in(runtime: Runtime, other: ThreadPoolExecutor) -> None:
    """To go on with it is refused; to close it ends it, in the middle of a step and while it waits."""
    inside, go_on = threading.Event(), threading.Event()
    stepping = runtime._stepper.stepping

    def slow(kind: Any) -> Callable[[], None]:
        one = stepping(kind)
        return lambda: (inside.set(), go_on.wait(SECONDS), one())[-1]

    runtime._stepper.stepping = slow  # type: ignore[method-assign]
    walk, behind = runtime.iterate(**SHORT), runtime.iterate(**SHORT)
    running, waiting = other.submit(next, walk), other.submit(next, behind)
    assert inside.wait(SECONDS)
    while not runtime._queue._waiting:
        pass
    for each in (walk, behind):
        with pytest.raises(Busy, match="another call goes on with this iterator"):
            next(each)
        each.close()
    with pytest.raises(Cancelled, match="its iterator was closed"):
        waiting.result(SECONDS)
    go_on.set()
    with pytest.raises(Cancelled, match="its iterator was closed"):
        running.result(SECONDS)
    runtime.sample(**SHORT, timeout=0)


def test_whenever_ctrl_c_comes_the_runtime_is_free(world: Bundle, other: ThreadPoolExecutor) -> None:
    """Also in the middle of taking a turn and of giving it back, while the traceback of the one before is kept."""
    with tstitch_trt.load(world, threads=1) as runtime:
        expected = runtime.sample(**ASKED).latents
        main, kept, done = threading.get_ident(), [], 0
        rng = np.random.default_rng(0)
        for trial in range(100):
            ready = threading.Event()

            def interrupt(ready: threading.Event = ready, wait: float = rng.uniform(0, 0.004)) -> None:
                ready.wait(SECONDS)
                threading.Event().wait(wait)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(KeyboardInterrupt))

            sent = other.submit(interrupt)
            try:
                ready.set()
                while True:
                    runtime.sample(**ASKED, decode=False)
                    runtime.decode(expected)
            except KeyboardInterrupt as error:
                kept.append(error)
            except TypeError as error:  # numpy makes one of what is raised while it looks for a loop
                kept.append(error)
            sent.result(SECONDS)
            call = partial(runtime.sample, **ASKED, timeout=0)
            found = other.submit(call).result(SECONDS) if trial % 2 else call()
            np.testing.assert_array_equal(found.latents, expected)
            done += 1
        assert done == 100


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


def test_close_waits_no_longer_for_a_step_than_it_was_told(other: ThreadPoolExecutor) -> None:
    queue, freed = WorkQueue(HostDevice()), []
    inside, leave = threading.Event(), threading.Event()
    running = other.submit(queue.do, lambda: (inside.set(), leave.wait(SECONDS)))
    assert inside.wait(SECONDS)
    with pytest.raises(Busy, match=r"a step still runs after 0.01 s"):
        queue.close(lambda: freed.append(1), cancel=True, timeout=0.01)
    assert not freed
    leave.set()
    queue.close(lambda: freed.append(1), cancel=True, timeout=SECONDS)
    running.result(SECONDS)
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


def test_what_a_closed_runtime_is_can_still_be_asked(world: Bundle) -> None:
    with tstitch_trt.load(world, threads=1) as runtime:
        calls = calls_of(runtime)
        before = {name: outcome(call) for name, call in calls.items()}
    engines = {"sample", "iterate", "decode", "images", "encode", "time_member", "time_step_kernels", "swap_lora"}
    engines |= {"restore", "lora", "exclusive", "lanes", "memory", "jit_ms", "graphs"}
    for name, call in calls.items():
        if name.split(" ")[0] in engines:
            with pytest.raises(Closed, match="this runtime is closed"):
                call()
        else:
            np.testing.assert_equal(outcome(call), before[name], err_msg=name)


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


# --- the end of the process


_ENDING = """
import os, signal, sys, threading, time
import numpy as np
import tstitch_trt

bundle, kind = sys.argv[1:]
runtime, other = (tstitch_trt.load(bundle, threads=1) for _ in range(2))
asked = {"prompt": "a fox", "steps": 8, "schedule": "plain", "n": 4}
begun = threading.Barrier(6)

def again(call):
    call()
    begun.wait()
    while True:
        call()

def walk():
    kept = other.iterate(**asked)
    next(kept)
    begun.wait()
    time.sleep(100)

latents = np.zeros((1, 4, 8, 8), np.float32)
calls = [
    lambda: runtime.sample(**asked),
    lambda: runtime.sample(**asked, callback=lambda event: event.latents()),
    lambda: (runtime.decode(latents), runtime.time_member("plain", 1, repeats=2)),
    lambda: tstitch_trt.load(bundle, threads=1),
]
for call in calls:
    threading.Thread(target=again, args=(call,), daemon=True).start()
threading.Thread(target=walk, daemon=True).start()
begun.wait()
time.sleep(0.05)
own = tstitch_trt.load(bundle, threads=1).iterate(**asked)
next(own)
if kind == "exit":
    sys.exit(3)
if kind == "interrupt":
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(100)
print("the end")
"""


@pytest.mark.parametrize(("kind", "code"), [("end", 0), ("exit", 3), ("interrupt", -signal.SIGINT)])
def test_the_interpreter_ends_while_threads_sample(world: Bundle, kind: str, code: int) -> None:
    """Daemon threads that sample, load, wait and hold iterators: no abort, no traceback of theirs."""
    done = subprocess.run(
        [sys.executable, "-c", _ENDING, str(world.root), kind], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == ("the end\n" if kind == "end" else "")
    errors = [line for line in done.stderr.splitlines() if not line.startswith(("  ", "Traceback"))]
    assert errors == (["KeyboardInterrupt"] if kind == "interrupt" else []), done.stderr


def test_closing_in_the_middle_of_another_runtimes_compiling(runtime: Runtime, other: ThreadPoolExecutor) -> None:
    """By a signal handler: a step that has to compile waits until this thread has compiled."""
    waiting = threading.Event()

    def compiling(enqueue: Callable[[], None]) -> None:
        waiting.set()
        with RECORDING:
            enqueue()

    for engine in runtime._engines.values():
        engine.enqueue = partial(compiling, engine.enqueue)  # type: ignore[method-assign]
    with RECORDING:
        running = other.submit(runtime.sample, **SHORT)
        assert waiting.wait(SECONDS)
        runtime.close(cancel=True, timeout=1)
    with pytest.raises(Cancelled):
        running.result(SECONDS)
    with pytest.raises(Closed):
        runtime.sample(**SHORT)
    assert not runtime._stepper._engines, "they are let go of"


_FORKING = """
import atexit, os, sys, threading
import tstitch_trt

runtime = tstitch_trt.load(sys.argv[1], threads=1)
held = runtime.iterate(prompt="a fox", steps=4, schedule="plain")
inside = threading.Event()

def hold():
    next(held)
    inside.set()
    threading.Event().wait()

threading.Thread(target=hold, daemon=True).start()
inside.wait()
if os.fork() == 0:
    for call in (lambda: runtime.sample(prompt="a fox"), runtime.memory):
        try:
            call()
        except tstitch_trt.FailedWork as error:
            assert "is a fork" in str(error)
        else:
            os._exit(9)
    runtime.close()
    atexit._run_exitfuncs()
    os._exit(1)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_is_told_to_load_its_own(world: Bundle) -> None:
    """The threads of engines are not in it: to wait for them would be for ever."""
    done = subprocess.run(
        [sys.executable, "-c", _FORKING, str(world.root)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr
