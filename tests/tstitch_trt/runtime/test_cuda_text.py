"""Text bundles on a CUDA device over the stand-in: sizes, control and blending are kinds of recorded steps.

The oracle is the runtime on the CPU, which ``test_pictured`` holds against float64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.cuda_stand_in import Machine, install
from support.hand_made_parts import World
from tstitch_engines.backends import Engine, open_backend
from tstitch_engines.bundle.bundle import Bundle, open_bundle
from tstitch_engines.device.base import Buffer
from tstitch_engines.device.cuda import CudaDevice
from tstitch_engines.device.host import HostDevice
from tstitch_engines.device.open import open_device
from tstitch_trt import Runtime
from tstitch_trt.runtime import component as parts
from tstitch_trt.runtime import stepper
from tstitch_trt.runtime.vae import Vae


class LateEngine(Engine):
    """An engine of the CPU whose runs are work on a stream of the stand-in, each on the buffers bound at that time."""

    def __init__(self, engine: Engine, machine: Machine, stream: int) -> None:
        super().__init__(engine.inputs, engine.outputs, engine.profile)
        self.engine, self.machine, self.stream = engine, machine, stream
        self.contexts: set[object] = set()  # what a library would set up: one for each set of buffers and sizes

    def _bind(self, buffers: Mapping[str, Buffer], batch: int) -> None:
        self.bound = (buffers, batch, {name: size for name, size in self.sizes.items() if name != "B"})
        self.contexts.add(self.key(buffers, self.sizes))

    @staticmethod
    def key(buffers: Mapping[str, Buffer], sizes: Mapping[str, int]) -> object:
        return (*sorted(sizes.items()), *sorted((name, buffer.ptr) for name, buffer in buffers.items()))

    def release(self, buffers: Mapping[str, Buffer], *, sizes: Mapping[str, int]) -> None:
        assert not self.machine.streams[self.stream].queue, "released what the device still works with"
        self.contexts.remove(self.key(buffers, sizes))

    def enqueue(self) -> None:
        buffers, batch, sizes = self.bound

        def run() -> None:
            self.engine.bind(buffers, batch=batch, sizes=sizes)
            self.engine.enqueue()

        self.machine.submit(self.stream, run)

    def close(self) -> None:
        self.engine.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(World().bundle(tmp_path_factory.mktemp("whole")).root)


@pytest.fixture(scope="module")
def cpu(bundle: Bundle) -> Runtime:
    return tstitch_trt.load(bundle, threads=1)


@pytest.fixture
def machine(kernels_on_host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return install(monkeypatch, kernels_on_host, tmp_path / "step_kernels.fatbin")


@pytest.fixture
def load(machine: Machine, bundle: Bundle) -> Callable[..., Runtime]:
    def make(place: str = "cuda", **options: Any) -> Runtime:
        device = open_device(place)
        assert isinstance(device, CudaDevice)
        decoding = device.with_own_stream()
        backend, engines = open_backend("onnxruntime"), {}
        for name, network in bundle.manifest.networks().items():
            record = network.engines[0]
            engine = backend.load(
                bundle.path(record.files[0]), member=network, identity=record.identity, device=HostDevice(), threads=1
            )
            engines[name] = LateEngine(engine, machine, (decoding if name == "vae_decoder" else device).stream_handle)
        return Runtime(bundle, device, "onnxruntime", engines, 0.0, places={"vae_decoder": decoding}, **options)

    return make


IMAGE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
MASK = np.zeros((64, 96), np.uint8)
MASK[:, :40] = 255
SIZE = {"height": 64, "width": 96}
REQUESTS: list[dict[str, Any]] = [
    {"n": 3},
    {"n": 3, **SIZE, "guidance": 3.0},
    {"n": 2, "control": IMAGE, "guidance": 2.0},
    {"n": 2, **SIZE, "guidance": 2.0},
    {"n": 2, "image": IMAGE, "mask": MASK, "strength": 0.7},
    {"n": 2, "image": IMAGE, "mask": MASK, "guidance": 2.0, "control": IMAGE, "schedule": "painter:0.5,steered"},
    {"n": 5, "prompt": ["a fox", "a red bear blurry sky sea"]},
]


@pytest.mark.parametrize("graph", ["step", "segment", "off"])
def test_every_kind_of_request_equals_the_cpu(load: Callable[..., Runtime], cpu: Runtime, graph: str) -> None:
    """In one runtime, one after another and again, so that nothing recorded for one is wrong for the next."""
    gpu = load(graph=graph)
    for request in [*REQUESTS, *reversed(REQUESTS)]:
        asked = {"prompt": "a red fox", "steps": 4, **request}
        ours, theirs = gpu.sample(**asked), cpu.sample(**asked)
        assert np.abs(ours.latents - theirs.latents).max() < 1e-4 * np.abs(theirs.latents).max(), request
        assert ours.images is not None
        assert theirs.images is not None
        assert np.abs(ours.images.astype(int) - theirs.images.astype(int)).max() <= 1


@pytest.mark.parametrize("current", [None, 0])
def test_any_thread_may_use_encoders_and_decoder(
    load: Callable[..., Runtime], cpu: Runtime, machine: Machine, current: int | None
) -> None:
    """One that has no current device, or has another."""
    gpu = load("cuda:1")
    pictures = np.random.default_rng(1).uniform(-1, 1, (2, 3, 64, 96)).astype(np.float32)
    mean, _ = cpu.encode(pictures)
    asked: dict[str, Any] = {"prompt": "a red fox", "steps": 2, "n": 2, "image": IMAGE, "strength": 0.7}
    calls: list[Callable[[Runtime], Any]] = [
        lambda runtime: runtime.encode(pictures)[0],
        lambda runtime: runtime.images(mean),
        lambda runtime: runtime.decode(mean),
        lambda runtime: runtime.sample(**asked).latents,
    ]

    def elsewhere(call: Callable[[Runtime], Any]) -> Any:
        machine.current = current
        found = call(gpu)
        assert machine.current == (1 if current is None else current)
        return found

    for call in calls:
        with ThreadPoolExecutor(1) as pool:
            ours, theirs = pool.submit(elsewhere, call).result(), call(cpu)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_between_first_and_last_step_there_are_launches_only(load: Callable[..., Runtime], machine: Machine) -> None:
    gpu = load()
    calls = gpu.device.calls
    asked: dict[str, Any] = {"prompt": "a red fox", "image": IMAGE, "mask": MASK, "control": IMAGE, "guidance": 2.0}
    gpu.sample(**asked, steps=4)
    recorded, before = machine.recorded, calls.copy()
    for event in gpu.iterate(**asked, steps=7, seed=3):
        if event.step > 1:
            assert calls - before == {"graph launch": 1}
        before = calls.copy()

    def cost(steps: int) -> Any:
        start = calls.copy()
        gpu.sample(**asked, steps=steps)
        return calls - start

    assert cost(14) - cost(4) == {"graph launch": 10}
    assert cost(4)["alloc"] == 0
    assert machine.recorded == recorded


@pytest.mark.parametrize("graph", ["step", "segment"])
def test_steps_are_recorded_again_after_a_network_was_changed(load: Callable[..., Runtime], graph: str) -> None:
    gpu = load(graph=graph)
    asked: dict[str, Any] = {"prompt": "a red fox", "control": IMAGE, "schedule": "plain:0.5,steered", "steps": 4}
    want = gpu.sample(**asked).latents
    assert gpu.graphs().recorded == 2
    for changed, left in (("plain", 1), ("text_encoder", 2), ("controlnet", 1), ("steered", 1)):
        gpu._stepper.forget(changed)
        assert gpu.graphs().recorded == left, changed
        assert np.array_equal(gpu.sample(**asked).latents, want)
        assert gpu.graphs().recorded == 2


def test_a_chunk_is_decoded_beside_the_steps_of_the_next(
    load: Callable[..., Runtime], cpu: Runtime, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in does work only when it is waited for: what is left on the steps' stream ran beside the decoder."""
    gpu = load()
    main = machine.streams[gpu.device.stream_handle]  # type: ignore[attr-defined]
    asked: dict[str, Any] = {"prompt": "a red fox", "steps": 4, "schedule": "plain:0.5,steered"}
    gpu.sample(n=4, **asked)
    left: list[int] = []
    images = Vae.images

    def watched(vae: Vae, latents: np.ndarray, **options: Any) -> np.ndarray:
        pictures = images(vae, latents, **options)
        left.append(sum(kind == "Kernel" for kind, _ in main.queue))
        return pictures

    with monkeypatch.context() as patch:
        patch.setattr(Vae, "images", watched)
        ours = gpu.sample(n=11, seed=2, **asked)
    assert len(left) == 3
    assert left[0] > 0  # the second chunk's steps are not done, and the first chunk's pictures are there
    assert left[1] > 0
    theirs = cpu.sample(n=11, seed=2, **asked)
    assert ours.images is not None
    assert theirs.images is not None
    assert np.abs(ours.images.astype(int) - theirs.images.astype(int)).max() <= 1


def test_decoding_beside_costs_no_call_between_the_steps(load: Callable[..., Runtime]) -> None:
    gpu = load()
    asked: dict[str, Any] = {"prompt": "a red fox", "n": 11, "schedule": "plain"}
    gpu.sample(steps=4, **asked)
    calls = gpu.device.calls  # type: ignore[attr-defined]

    def cost(steps: int) -> Any:
        start = calls.copy()
        gpu.sample(steps=steps, **asked)
        return calls - start

    few, many = cost(4), cost(9)
    assert many - few == {"graph launch": 15}  # three chunks
    assert few["alloc"] == 0


def test_many_sizes_keep_a_bounded_number_of_graphs_and_contexts(
    load: Callable[..., Runtime], cpu: Runtime, machine: Machine, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(stepper, "STEP_KEYS", 4)
    monkeypatch.setattr(parts, "_SIZES", 3)
    gpu = load(graph="step")
    sizes = [(32, 32), (32, 48), (48, 32), (48, 48), (64, 32), (32, 64)]
    asked: dict[str, Any] = {"prompt": "a red fox", "steps": 2, "n": 1}
    for height, width in [*sizes, *sizes]:
        more: dict[str, Any] = {"height": height, "width": width, "schedule": "plain:0.5,painter"}
        more |= {"image": IMAGE[:height, :width], "mask": MASK[:height, :width], "guidance": 2.0}
        ours, theirs = (runtime.sample(**asked, **more) for runtime in (gpu, cpu))
        assert np.abs(ours.latents - theirs.latents).max() < 1e-4 * np.abs(theirs.latents).max()
    engines: Any = gpu._engines
    assert gpu.graphs().recorded == 4
    assert {name: len(engines[name].contexts) for name in ("plain", "painter", "vae_decoder", "vae_encoder")} == {
        "plain": 2, "painter": 2, "vae_decoder": 3, "vae_encoder": 3,
    }  # fmt: skip
    assert len(machine.graphs) == 4
    assert sum("more than 4 kinds of step" in record.getMessage() for record in caplog.records) == 1
    again = machine.recorded
    gpu.sample(**asked, height=32, width=64, guidance=2.0, schedule="plain")  # without the mask: another kind
    gpu.sample(**asked, height=32, width=64, guidance=2.0, schedule="plain")
    assert machine.recorded == again + 1


def test_kinds_that_share_a_context_keep_it(load: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rescaled step and a plain one are two kinds on the same buffers."""
    monkeypatch.setattr(stepper, "STEP_KEYS", 2)
    gpu = load()
    engines: Any = gpu._engines
    asked: dict[str, Any] = {"prompt": "a red fox", "steps": 2, "n": 1, "schedule": "plain", "guidance": 2.0}
    gpu.sample(**asked)
    gpu.sample(**asked, guidance_rescale=0.5)
    assert len(engines["plain"].contexts) == 1
    gpu.sample(**{**asked, "guidance": 1.0})  # the first kind makes room, the context stays for the second
    assert len(engines["plain"].contexts) == 2
    gpu.sample(**{**asked, "n": 2})
    assert len(engines["plain"].contexts) == 2
    assert np.isfinite(gpu.sample(**asked).latents).all()
