"""The runtime on a CUDA device over the stand-in (``cuda_stand_in``): graphs, buckets, order of work, memory.

Engines are ONNX Runtime's, whose runs are put into the device's stream. Everything between them and the stand-in is
the code that runs on a GPU. The oracle is the runtime on the CPU, which is held against PyTorch elsewhere.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.cuda_stand_in import Machine, install
from support.lanes import CLASSES, run, solo
from support.tiny import TinyPair
from tstitch_engines.backends import Engine, open_backend
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.device.base import Buffer
from tstitch_engines.device.cuda import CudaDevice
from tstitch_engines.device.host import HostDevice
from tstitch_engines.device.open import open_device
from tstitch_engines.errors import BadEngine, BadInput, FailedWork, NotFinite, UnknownName
from tstitch_engines.trace import Trace
from tstitch_trt import Runtime
from tstitch_trt.bench.bench import measure
from tstitch_trt.bench.torch_eager import EagerTorch
from tstitch_trt.runtime.result import StepEvent
from tstitch_trt.runtime.trajectory import Trajectory
from tstitch_trt.serve import engine as serving


class LateEngine(Engine):
    """An engine of the CPU whose runs are work on a stream of the stand-in, each on the buffers bound at that time."""

    def __init__(self, engine: Engine, machine: Machine, stream: int) -> None:
        super().__init__(engine.inputs, engine.outputs, engine.profile)
        self.engine = engine
        self.machine = machine
        self.stream = stream
        self.enqueued = 0

    def _bind(self, buffers: Mapping[str, Buffer], batch: int) -> None:
        self.bound = (buffers, batch)

    def work(self) -> Callable[[], object]:
        buffers, batch = self.bound

        def run() -> None:
            self.engine.bind(buffers, batch=batch)
            self.engine.enqueue()

        return run

    def enqueue(self) -> None:
        self.enqueued += 1
        self.machine.submit(self.stream, self.work())

    def scratch(self) -> Mapping[int, int]:
        return {4096: 1000}

    def close(self) -> None:
        self.engine.close()


@pytest.fixture(scope="module")
def cpu(tiny_pair: TinyPair) -> Runtime:
    return tstitch_trt.load(tiny_pair.bundle, threads=1)


@pytest.fixture
def machine(kernels_on_host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return install(monkeypatch, kernels_on_host, tmp_path / "step_kernels.fatbin")


Load = Callable[..., Runtime]


@pytest.fixture
def load(machine: Machine, tiny_pair: TinyPair) -> Load:
    def make(
        path: Path | None = None, kind: type[LateEngine] = LateEngine, place: str = "cuda", **options: Any
    ) -> Runtime:
        device = open_device(place)
        assert isinstance(device, CudaDevice)
        bundle, backend = open_bundle(path or tiny_pair.bundle), open_backend("onnxruntime")
        engines = {}
        for name, member in bundle.manifest.members.items():
            record = member.engines[0]
            engine = backend.load(
                bundle.path(record.files[0]), member=member, identity=record.identity, device=HostDevice(), threads=1
            )
            engines[name] = kind(engine, machine, device.stream_handle)
        return Runtime(bundle, device, "onnxruntime", engines, 0.0, **options)

    return make


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max())


REQUESTS: list[dict[str, Any]] = [
    {"solver": "ddim", "steps": 5, "guidance": 3.0, "fraction": 0.4, "guided_channels": 3},
    {"solver": "ddpm", "steps": 8, "guidance": 2.0, "fraction": 0.5, "variance": "learned", "seed": 9},
    {"solver": "dpmpp-2m", "steps": 6, "guidance": 1.0, "schedule": "large:2,small,large:2"},
    {"solver": "dpmpp-3m-sde", "steps": 7, "guidance": 2.0, "guidance_rescale": 0.7, "fraction": 0.4},
    {"solver": "euler", "steps": 10, "guidance": 4.0, "guidance_interval": (2, 6), "fraction": 0.3},
]


def test_any_request_replays_the_same_graphs_and_equals_the_cpu(load: Load, cpu: Runtime, machine: Machine) -> None:
    gpu = load()
    for request in REQUESTS:
        for n in (3, 4):
            ours, theirs = (runtime.sample(labels=[3, 7, 0], n=n, **request) for runtime in (gpu, cpu))
            assert close(ours.latents, theirs.latents), request
    # Both members guided, unguided and rescaled, all at 4 lanes.
    assert machine.recorded == 6
    others = [
        {"solver": "lcm", "steps": 3, "guidance": 7.5, "fraction": 0.9, "seed": 2**40},
        {"solver": "dpmpp-2m", "steps": 12, "guidance": {"large": 2.0}, "schedule": "small:1,large,small:3"},
        {"solver": "euler-ancestral", "steps": 4, "guidance": 1.0},
    ]
    for request in others:
        ours, theirs = (runtime.sample(n=4, **request) for runtime in (gpu, cpu))
        assert close(ours.latents, theirs.latents), request
    assert machine.recorded == 6


def test_between_first_and_last_step_there_are_launches_only(load: Load) -> None:
    gpu = load()
    calls = gpu.device.calls
    gpu.sample(n=2, steps=4, fraction=0.5)
    before = calls.copy()
    for event in gpu.iterate(n=2, steps=9, fraction=0.4, seed=3):
        if event.step > 1:
            assert calls - before == {"graph launch": 1}
        before = calls.copy()

    def cost(steps: int) -> Any:
        start = calls.copy()
        gpu.sample(n=2, steps=steps, fraction=0.5, solver="ddpm")
        return calls - start

    assert cost(20) - cost(4) == {"graph launch": 16}
    assert cost(4)["alloc"] == 0


def test_a_trace_has_the_times_of_the_device(load: Load) -> None:
    gpu = load()
    asked: dict[str, Any] = {"n": 12, "steps": 4, "fraction": 0.5}
    gpu.sample(**asked)
    before = gpu.device.calls.copy()
    gpu.sample(**asked)
    waits = gpu.device.calls["sync"] - before["sync"]
    with Trace() as trace:
        before = gpu.device.calls.copy()
        gpu.sample(**asked)
    assert gpu.device.calls["sync"] - before["sync"] == waits + 1, "the clocks are compared once"
    events = [e for e in json.loads(trace.to_json())["traceEvents"] if e["ph"] == "X"]
    (host, device) = ([e for e in events if e["name"] == "step" and e["cat"] == kind] for kind in ("host", "device"))
    assert [e["args"] for e in device] == [e["args"] for e in host]
    assert [e["args"]["member"] for e in device] == 2 * ["small", "small", "large", "large"]
    for one, following in pairwise(device):
        assert one["ts"] + one["dur"] <= following["ts"] + 1e-3
    assert [e["name"] for e in events].count("graph replay") == 8


def test_time_in_which_the_device_waits_for_the_host_is_no_step_of_it(load: Load) -> None:
    def wait(event: StepEvent) -> None:
        event.estimate()  # the device has done all so far
        time.sleep(0.05)

    gpu = load()
    with Trace() as trace:
        gpu.sample(n=1, steps=3, callback=wait)
    events = json.loads(trace.to_json())["traceEvents"]
    device = [e for e in events if e["ph"] == "X" and e["cat"] == "device"]
    assert len(device) == 3
    for one, following in pairwise(device):
        assert following["ts"] - (one["ts"] + one["dur"]) >= 50_000


def test_a_segment_in_one_launch_is_one_span(load: Load) -> None:
    gpu = load(graph="segment")
    with Trace() as trace:
        gpu.sample(n=1, schedule="small:1,large:3", steps=4)
    events = [e for e in json.loads(trace.to_json())["traceEvents"] if e["ph"] == "X"]
    for kind in ("host", "device"):
        steps = [e["args"] for e in events if e["name"] == "step" and e["cat"] == kind]
        assert [(s["step"], s["member"], s.get("steps", 1)) for s in steps] == [(1, "small", 1), (2, "large", 3)]


def test_lanes_come_in_few_sizes(load: Load, cpu: Runtime, machine: Machine) -> None:
    """Engines of 1 to 8, tuned for 4: 1, 2, 4 and 8 lanes unguided, 1, 2 and 4 guided."""
    gpu = load()
    for n in range(1, 9):
        ours, theirs = (runtime.sample(n=n, steps=2, fraction=0.0, seed=n) for runtime in (gpu, cpu))
        assert close(ours.latents, theirs.latents)
    assert machine.recorded == 4
    for n in range(1, 5):
        gpu.sample(n=n, steps=2, fraction=0.0, guidance=2.0)
    assert machine.recorded == 7


def test_chunks_are_enqueued_before_the_first_is_waited_for(
    load: Load, cpu: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = load()
    gpu.sample(n=8, steps=2, fraction=0.5)
    launched: list[int] = []
    collect = Trajectory.collect

    def watched(walk: Trajectory, done: Any) -> Any:
        launched.append(gpu.device.calls["graph launch"] - start["graph launch"])
        return collect(walk, done)

    start = gpu.device.calls.copy()
    with monkeypatch.context() as patch:
        patch.setattr(Trajectory, "collect", watched)
        ours = gpu.sample(n=21, steps=4, fraction=0.5, solver="ddpm")
    assert launched == [8, 12, 12]  # three chunks of four steps: each is collected after the next was enqueued
    theirs = cpu.sample(n=21, steps=4, fraction=0.5, solver="ddpm")
    assert close(ours.latents, theirs.latents)
    assert ours.images is not None
    assert theirs.images is not None
    assert np.abs(ours.images.astype(int) - theirs.images.astype(int)).max() <= 1
    assert [(t.member, t.steps) for t in ours.timings] == [("small", 2), ("large", 2)]


def test_memory_does_not_grow(load: Load, machine: Machine) -> None:
    gpu = load()

    def work() -> None:
        for request in REQUESTS:
            gpu.sample(n=4, **request)
        gpu.sample(n=13, steps=2)
        gpu.sample(n=3, steps=2, output="device")

    for _ in range(2):
        work()
    held, allocated = len(machine.memory), gpu.device.calls["alloc"]
    for _ in range(2):
        work()
    own = 2  # results that were left on the device have memory of their own
    assert (len(machine.memory), gpu.device.calls["alloc"]) == (held + own, allocated + own)
    memory = gpu.memory()
    assert memory["arena"] > 0
    assert memory["engine io"] % 256 == 0
    assert memory["activations"] == 1000  # two engines, one block


def test_whole_segments_in_one_launch(load: Load, cpu: Runtime) -> None:
    gpu = load(graph="segment")
    gpu.sample(n=4, steps=10, fraction=0.4)
    before = gpu.device.calls.copy()
    ours = gpu.sample(n=4, steps=10, fraction=0.4, solver="ddpm", seed=4)
    assert (gpu.device.calls - before)["graph launch"] == 2
    assert close(ours.latents, cpu.sample(n=4, steps=10, fraction=0.4, solver="ddpm", seed=4).latents)
    before = gpu.device.calls.copy()
    request: dict[str, Any] = {"steps": 8, "fraction": 0.5, "guidance": 3.0, "guidance_interval": (2, 6)}
    ours = gpu.sample(n=4, **request)
    assert (gpu.device.calls - before)[
        "graph launch"
    ] == 4 + 2  # both members in both ways, and each guided recording tried
    assert close(ours.latents, cpu.sample(n=4, **request).latents)


def test_graphs_can_be_switched_off(load: Load, cpu: Runtime, machine: Machine) -> None:
    gpu = load(graph="off")
    assert close(gpu.sample(n=3, steps=4).latents, cpu.sample(n=3, steps=4).latents)
    assert machine.recorded == 0
    with pytest.raises(UnknownName, match="unknown graph 'steps'"):
        tstitch_trt.load("nowhere", graph="steps")  # type: ignore[arg-type]


class Unrecordable(LateEngine):
    """As TensorRT-RTX does: it knows once it has run."""

    ran = 0

    def enqueue(self) -> None:
        super().enqueue()
        self.ran += 1

    @property
    def obstacle(self) -> str:
        return "it allocates" if self.ran else ""


class CallsTheHost(LateEngine):
    def enqueue(self) -> None:
        super().enqueue()
        self.machine.submit(self.stream, lambda: None, kind="Host")


class Refusing(LateEngine):
    def enqueue(self) -> None:
        if self.machine.streams[self.stream].recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        super().enqueue()


class ComputesOnTheCpu(LateEngine):
    """As a library does with operators that its CUDA provider lacks: a recording keeps the first result for good."""

    def enqueue(self) -> None:
        stream = self.machine.streams[self.stream]
        recording, stream.recording = stream.recording, None
        stream.sync()
        stream.recording = recording
        self.work()()
        self.machine.submit(self.stream, lambda: None)


class Uploading(LateEngine):
    """As TensorRT may: values that it computed of shapes go from the host's memory to the device with every run."""

    def __init__(self, engine: Engine, machine: Machine, stream: int) -> None:
        super().__init__(engine, machine, stream)
        self.values = np.arange(4)
        self.target = machine.array(self.values.shape, self.values.dtype)

    def enqueue(self) -> None:
        from cuda.bindings import runtime

        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        ends = (self.target.ctypes.data, self.values.ctypes.data)
        runtime.cudaMemcpyAsync(*ends, self.values.nbytes, kind, self.stream)
        super().enqueue()


class KeepsUploads(Uploading):
    keeps_uploads = True


@pytest.mark.parametrize("mode", ["step", "segment"])
def test_an_engine_that_keeps_what_it_uploads_is_recorded(load: Load, cpu: Runtime, mode: str) -> None:
    gpu = load(kind=KeepsUploads, graph=mode)
    ours = gpu.sample(n=2, steps=4, fraction=0.5, seed=1)
    assert close(ours.latents, cpu.sample(n=2, steps=4, fraction=0.5, seed=1).latents)
    assert gpu.graphs().recorded > 0
    assert gpu.graphs().call_by_call == {}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Uploading, "a copy from or to ordinary host memory"),
        (Unrecordable, "its engine can't be recorded: it allocates"),
        (CallsTheHost, "a call of a host function"),
        (Refusing, "operation not permitted when stream is capturing"),
        (ComputesOnTheCpu, "a replay on other data differed from a plain run"),
    ],
)
def test_what_can_not_be_recorded_runs_call_by_call_and_says_why_once(
    load: Load, cpu: Runtime, caplog: pytest.LogCaptureFixture, kind: type[LateEngine], reason: str
) -> None:
    gpu = load(kind=kind)
    with caplog.at_level(logging.WARNING):
        for seed in (1, 2):
            ours = gpu.sample(n=2, steps=4, fraction=0.5, seed=seed)
            assert close(ours.latents, cpu.sample(n=2, steps=4, fraction=0.5, seed=seed).latents)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    for name, message in zip(("small", "large"), said, strict=True):
        assert f"member '{name}', 2 lanes runs call by call" in message
        assert reason in message


class StopsOnce(LateEngine):
    """Raises once, at the call of ``enqueue`` that ``stop`` tells, as Ctrl-C does or a CUDA error."""

    error: type[BaseException] = KeyboardInterrupt
    at = 1

    def enqueue(self) -> None:
        if self.enqueued == self.at:
            self.enqueued += 1
            raise self.error("once")
        super().enqueue()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [0, 2], ids=["warming up", "comparing"])  # the call after is the recorded one
def test_a_recording_that_something_else_ended_is_made_again(
    load: Load, cpu: Runtime, machine: Machine, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], at: int
) -> None:
    monkeypatch.setattr(StopsOnce, "error", error)
    monkeypatch.setattr(StopsOnce, "at", at)
    gpu = load(kind=StopsOnce)
    asked: dict[str, Any] = {"n": 2, "steps": 4, "schedule": "small"}
    with pytest.raises(error, match="once"):
        gpu.sample(**asked)
    assert gpu.graphs().recorded == 0
    assert gpu.graphs().call_by_call == {}
    assert machine.graphs == {}, "what was recorded is freed"
    assert close(gpu.sample(**asked).latents, cpu.sample(**asked).latents)
    assert gpu.graphs().recorded == 1


class RefusesSegments(LateEngine):
    """One step can be recorded, two in a row can't."""

    def enqueue(self) -> None:
        recording = self.machine.streams[self.stream].recording
        if recording is not None and sum(kind == "Kernel" for kind, _ in recording) > 5:
            raise RuntimeError("too long")
        super().enqueue()


def test_a_refused_segment_is_remembered(load: Load, cpu: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    gpu = load(kind=RefusesSegments, graph="segment")
    with caplog.at_level(logging.WARNING):
        for seed in (1, 2):
            asked: dict[str, Any] = {"n": 2, "steps": 4, "schedule": "small", "seed": seed}
            assert close(gpu.sample(**asked).latents, cpu.sample(**asked).latents)
            assert gpu.device.calls["capture"] == 2  # of the step, and of the segment, which was refused
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("4 steps of member 'small', 2 lanes in one run one by one: the work can't be recorded")
    assert list(gpu.graphs().call_by_call) == ["4 steps of member 'small', 2 lanes in one"]


def test_recording_disturbs_no_request(load: Load, cpu: Runtime, machine: Machine) -> None:
    """The second chunk, of another size, is recorded while the first is still on its way."""
    gpu = load()
    ours = gpu.sample(n=13, steps=3, fraction=0.5, guidance=2.0)
    assert machine.recorded == 4  # 4 lanes, and 1
    assert close(ours.latents, cpu.sample(n=13, steps=3, fraction=0.5, guidance=2.0).latents)


def test_lanes_in_mid_flight_survive_recording(
    load: Load, cpu: Runtime, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of step is recorded when a lane first has it next, while the lanes before are in mid-flight."""
    made = dict(zip((2, 0, 3, 1, 6, 4), (solo(cpu, asked, monkeypatch) for asked in CLASSES), strict=True))
    stepper = load()._stepper
    programs = {slot: program for slot, (program, _) in made.items()}
    for first in (0, 2):
        recorded = machine.recorded
        found = run(stepper, programs, {slot: first + 2 * i for i, slot in enumerate(programs)}, alone=False)
        for slot, (_, want) in made.items():
            assert close(found[slot], want), slot
    assert 0 < recorded == machine.recorded  # the second time every step is a replay


class Tensor:
    def __init__(self, machine: Machine, values: np.ndarray) -> None:
        memory = machine.array(values.shape, values.dtype)
        memory[...] = values
        self.__cuda_array_interface__ = {
            "shape": values.shape, "typestr": values.dtype.str, "data": (memory.ctypes.data, False), "version": 3,
        }  # fmt: skip


@pytest.mark.parametrize("solver", ["ddim", "euler"])  # euler scales the noise
def test_latents_of_others_go_in_and_out_without_the_host(
    load: Load, cpu: Runtime, machine: Machine, solver: str
) -> None:
    gpu = load()
    noise = np.random.default_rng(0).standard_normal((11, 4, 8, 8)).astype(np.float32)
    labels = list(range(10))
    theirs = cpu.sample(labels=labels, latents=noise, steps=4, solver=solver)
    tensor = Tensor(machine, noise)
    gpu.sample(labels=labels, latents=tensor, steps=4, output="device")
    before = gpu.device.calls.copy()
    ours = gpu.sample(labels=labels, latents=tensor, steps=4, solver=solver, output="device")
    assert (gpu.device.calls - before)["download"] == 2  # each chunk's faults
    shared = ours.device_latents
    pointer = shared.__cuda_array_interface__["data"][0]
    assert close(machine.array(shared.shape, np.float32, pointer), theirs.latents)
    assert ours.images is None
    again = gpu.sample(labels=labels, latents=noise, steps=4, solver=solver, output="device").device_latents
    assert again.__cuda_array_interface__["data"][0] != pointer
    assert close(machine.array(shared.shape, np.float32, pointer), theirs.latents), "a result is not overwritten"
    with pytest.raises(BadInput, match="left on the device"):
        _ = ours.latents


def test_bad_foreign_latents(load: Load, machine: Machine) -> None:
    gpu = load()
    with pytest.raises(BadInput, match=r"latents are float16\[1, 4, 8, 8\]; needed is float32"):
        gpu.sample(n=1, steps=2, latents=Tensor(machine, np.zeros((1, 4, 8, 8), np.float16)))
    with pytest.raises(NotFinite, match="after step 1 of 2"):
        gpu.sample(n=1, steps=2, latents=Tensor(machine, np.full((1, 4, 8, 8), np.nan, np.float32)))
    with pytest.raises(BadInput, match="decode=True with output='device'"):
        gpu.sample(n=1, steps=2, output="device", decode=True)
    with pytest.raises(UnknownName, match="unknown output 'gpu'"):
        gpu.sample(n=1, steps=2, output="gpu")  # type: ignore[arg-type]


def test_a_fault_is_named_and_the_next_request_is_fine(load: Load, cpu: Runtime, tiny_pair: TinyPair) -> None:
    gpu = load(tiny_pair.broken_large())
    with pytest.raises(NotFinite, match=r"after step 5 of 10, made by member 'large'.*seed 15; 1 of 8 lanes"):
        gpu.sample(labels=[2, 2, 2, 2, 2, 2, 2, 2, 1], n=16, steps=10, fraction=0.4, seed=7)
    assert np.isfinite(gpu.sample(labels=[2], steps=10, fraction=0.4, seed=7).latents).all()


def test_results_on_the_cpu_device_are_numpy(cpu: Runtime) -> None:
    import torch

    noise = torch.randn(2, 4, 8, 8)
    result = cpu.sample(labels=[1, 2], latents=noise, steps=3, output="device")
    shared = torch.from_dlpack(result.device_latents)
    plain = cpu.sample(labels=[1, 2], latents=noise.numpy(), steps=3)
    np.testing.assert_array_equal(shared.numpy(), plain.latents)
    with pytest.raises(BadInput, match="are on the host"):
        _ = plain.device_latents
    with pytest.raises(BadInput, match="can't be read as latents"):
        cpu.sample(labels=[1, 2], latents=noise.requires_grad_(), steps=3)


# --- threads, devices, and the end


def test_any_thread_may_call(load: Load, cpu: Runtime, machine: Machine) -> None:
    """Each call comes from a thread that has no current device."""
    gpu = load()
    asked: dict[str, Any] = {"n": 2, "steps": 3, "schedule": "small"}
    want = cpu.sample(**asked)
    shared = gpu.sample(**asked, output="device")
    events = gpu.iterate(**asked)

    def elsewhere(call: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call).result()

    for _ in range(2):
        event = elsewhere(lambda: next(events))
    assert event.step == 2
    assert elsewhere(event.latents).shape == want.latents.shape
    assert elsewhere(event.estimate).shape == want.latents.shape
    elsewhere(events.close)
    assert close(elsewhere(lambda: gpu.sample(**asked)).latents, want.latents)
    assert len(elsewhere(lambda: gpu.time_member("small", 2, repeats=2, warmup=1))) == 2
    assert len(elsewhere(lambda: gpu.time_step_kernels(2, repeats=2, warmup=1))) == 2
    for call in (gpu.memory, gpu.graphs, gpu.jit_ms, lambda: shared.device_latents.__dlpack__(stream=-1)):
        elsewhere(call)
    elsewhere(gpu.close)
    assert machine.graphs == {}


def test_two_devices_take_turns_in_one_thread(load: Load, cpu: Runtime, machine: Machine) -> None:
    gpus = [load(place="cuda:0"), load(place="cuda:1")]
    assert [gpu.device.name for gpu in gpus] == ["cuda:0", "cuda:1"]
    asked: dict[str, Any] = {"n": 3, "steps": 4, "fraction": 0.5}
    want = cpu.sample(**asked).latents
    open_ends = [gpu.iterate(**asked) for gpu in gpus]
    for _ in range(3):  # one step of each
        for events in open_ends:
            assert next(events).latents().shape == want.shape
    for events in open_ends:
        events.close()
    for gpu in (*gpus, *gpus):
        assert close(gpu.sample(**asked).latents, want)
    for gpu in gpus:
        gpu.close()
    assert machine.graphs == {}


def test_a_thread_keeps_the_device_that_it_had(load: Load, machine: Machine, tiny_pair: TinyPair) -> None:
    """PyTorch's ``cuda`` without a number is the current device."""
    gpu = load()
    asked: dict[str, Any] = {"n": 2, "steps": 2}
    machine.current = 1
    latents = gpu.sample(**asked).latents
    assert machine.current == 1
    with gpu.lanes() as lanes:
        lanes.decode(latents)
        next(lanes.warm_up(lambda key: 1))
        assert machine.current == 1
    events = gpu.iterate(**asked)
    event = next(events)
    assert machine.current == 1
    event.latents()
    events.close()
    assert machine.current == 1
    with pytest.raises(BadEngine, match="cuda"):
        tstitch_trt.load(tiny_pair.bundle, device="cuda:0")
    assert machine.current == 1
    gpu.close()
    assert machine.current == 1


def test_a_runtime_that_nobody_closed_leaves_no_graph(load: Load, machine: Machine) -> None:
    gpu = load(graph="segment")
    gpu.sample(n=2, steps=4, fraction=0.5)
    assert machine.graphs
    gone = weakref.ref(gpu)
    del gpu
    gc.collect()
    assert gone() is None
    assert machine.graphs == {}


def test_closing_on_a_lost_device_lets_go_of_everything(load: Load, machine: Machine) -> None:
    gpu = load()
    gpu.sample(n=2, steps=4, fraction=0.5)
    closed: list[str] = []
    for name, engine in gpu._engines.items():
        engine.close = lambda name=name: closed.append(name) or 1 // 0  # type: ignore[method-assign]
    machine.error = 719
    with pytest.raises(FailedWork, match="error 719"):
        gpu.close()
    assert closed == ["small", "large"]
    assert machine.graphs == {}
    gpu.close()  # nothing is left to do
    machine.error = 0


def test_an_error_in_the_block_is_not_hidden_by_closing(load: Load, machine: Machine) -> None:
    def block() -> None:
        with load() as gpu:
            gpu.sample(n=2, steps=2)
            machine.error = 719
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        block()
    machine.error = 0
    assert machine.graphs == {}


def test_an_error_of_cuda_has_a_hint(load: Load, machine: Machine) -> None:
    gpu = load()
    events = gpu.iterate(n=2, steps=4)
    next(events)
    machine.error = 719
    with pytest.raises(FailedWork, match="error 719") as caught:
        next(events)
    assert caught.value.hint
    machine.error = 0


def test_a_result_on_the_device_outlives_what_reads_it(load: Load, machine: Machine) -> None:
    """Another library's stream reads it late, when the result was dropped and the next request has its memory."""
    gpu, reader = load(), machine.stream()
    asked: dict[str, Any] = {"n": 2, "steps": 2, "output": "device"}
    want = gpu.sample(n=2, steps=2).latents
    result = gpu.sample(**asked)
    lying = machine.array(want.shape, np.float32, result.device_latents.__cuda_array_interface__["data"][0])
    result.device_latents.__dlpack__(stream=reader.handle)
    read: list[np.ndarray] = []
    machine.submit(reader.handle, lambda: read.append(lying.copy()))
    del result
    gpu.sample(**asked)
    assert not np.array_equal(lying, want)
    np.testing.assert_array_equal(read[0], want)


# --- many requests at once


def test_an_engine_batches_the_steps_of_many_requests(load: Load, cpu: Runtime, machine: Machine) -> None:
    """Its warm-up records every bucket; no request records another, or waits while its steps are enqueued."""
    asked = [{"labels": [3, 7, 0][:n], "seed": 5 * n, **request} for request in REQUESTS for n in (1, 3)]
    with load() as gpu, serving.Engine(gpu, max_lanes=7) as engine:
        engine.warm_up()
        recorded = machine.recorded
        handles = [engine.submit(**each, previews=each["labels"][0] % 2) for each in asked]
        for handle, each in zip(handles, asked, strict=True):
            assert close(handle.result(30).latents, cpu.sample(**each).latents), each
        rescaled = {key for key in gpu._stepper._recent if key.rescale}
        assert machine.recorded == recorded + len(rescaled)


def test_a_lane_that_is_not_finite_fails_alone_where_the_host_runs_ahead(load: Load, tiny_pair: TinyPair) -> None:
    """Label 1 is NaN in the large member, which the host learns at the end."""
    asked: dict[str, Any] = {"steps": 10, "fraction": 0.4, "seed": 7}
    with load(tiny_pair.broken_large()) as gpu, serving.Engine(gpu) as engine:
        bad = engine.submit(labels=[2, 1], **asked, partial=True)
        other = engine.submit(labels=[2], **asked)
        (failed,) = bad.result(30).failed
        assert (failed.image, failed.step, failed.member) == (1, 5, "large")
        assert close(other.result(30).latents, bad.result(30).latents[:1])


def test_an_error_that_stays_is_a_lost_device(load: Load, machine: Machine) -> None:
    with load() as gpu:
        assert gpu.device.lost() is None
        machine.error = 700
        assert gpu.device.lost() == "cuda:0: it can't be used: error 700"
        machine.error = 0


@pytest.mark.parametrize("mode", ["step", "segment", "off"])
def test_bare_calls_are_launched_as_steps_are(load: Load, mode: Any) -> None:
    """Else what a trajectory costs over them would be the difference between replays and single calls."""
    with load(graph=mode) as gpu:
        for measure in (
            lambda: gpu.time_member("large", 2, repeats=5, warmup=1),
            lambda: gpu.time_step_kernels(2, repeats=5, warmup=1),
        ):
            measure()  # records what is new
            calls = gpu.device.calls.copy()
            assert len(measure()) == 5
            made = gpu.device.calls - calls
            assert made["graph launch"] == (0 if mode == "off" else 6)
            assert made["sync"] <= 3, made  # none between two of them


def test_bench_compares_no_gpu_with_a_baseline_on_the_cpu(load: Load) -> None:
    with load() as gpu:
        baseline = EagerTorch.of(gpu.bundle, threads=1)
        with pytest.raises(BadInput, match="runs on the CPU and the runtime on cuda:0"):
            measure(gpu, fractions=(0.5,), steps=4, repeats=1, baseline=baseline)
