"""LoRAs put into loaded engines equal LoRAs fused when the bundle is built, and leave nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import tstitch_trt
from support.command import Command, refused
from support.hub_server import running_hub
from support.tiny_families import clip_text_folder, lora_file, unet_folder
from tstitch_engines.backends import Engine, open_backend
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.device.open import open_device
from tstitch_engines.errors import BadCheckpoint, BadInput, Busy, FailedWork, TStitchError, Unavailable, UnknownName
from tstitch_engines.progress import silent
from tstitch_engines.spec import Range
from tstitch_export.build import build
from tstitch_export.families import open_family
from tstitch_export.onnx_export.exporter import export_program
from tstitch_trt import Runtime
from tstitch_trt.runtime.lora import Loras

_RECIPE = """
name = "one"
description = "One tiny UNet."
[latent]
channels = 4
height = 8
width = 8
scaling = 0.18215
[noise]
kind = "scaled-linear"
steps = 1000
beta_start = 0.00085
beta_end = 0.012
[conditioning]
kind = "text"
[defaults]
solver = "ddim"
steps = 3
spacing = "leading"
guidance = 1.0
schedule = "large"
[decoder]
kind = "none"
factor = 8
[members.large]
family = "unet-sd"
parametrisation = "eps"
[parts.text_encoder]
family = "clip-text"
subfolder = "text_encoder"
"""


class Made(NamedTuple):
    folder: Path
    unet: Any
    text: Any

    def build(self, *, backend: str) -> Path:
        output = self.folder / "plain.bundle"
        members, one = {"large": self.folder / "pipeline"}, Range(1, 1, 1)
        build(self.folder / "one.toml", members=members, output=output, backend=backend, profile=one)
        return output

    def fused(self, network: str, family: str, loras: str) -> Runtime:
        """The bundle with an engine that is made as a build with these LoRAs makes it, without its ONNX."""
        opened = open_family(family)
        inspection = opened.inspect(self.folder / "pipeline", {"lora": loras})
        program = self.folder / f"{network}.pt2"
        export_program(opened, inspection, precision="fp32", output=program, progress=silent)
        bundle, device, backend = open_bundle(self.folder / "plain.bundle"), open_device("cpu"), open_backend("torch")
        engines = {
            name: backend.load(
                program if name == network else bundle.path(each.engines[0].files[0]),
                member=each, identity=each.engines[0].identity, device=device, threads=1,
            )
            for name, each in bundle.manifest.networks().items()
        }  # fmt: skip
        return Runtime(bundle, device, "torch", engines, 0.0)

    def lora(self, name: str, **settings: Any) -> Path:
        return lora_file(self.folder / name, self.unet, **settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("lora")
    (folder / "one.toml").write_text(_RECIPE)
    unet = unet_folder(folder / "pipeline", "least", seed=5)
    text = clip_text_folder(folder / "pipeline", layers=2)
    made = Made(folder, unet, text)
    made.build(backend="torch")
    return made


@pytest.fixture(scope="module")
def loaded(made: Made) -> Iterator[Runtime]:
    with tstitch_trt.load(made.folder / "plain.bundle", threads=1) as runtime:
        yield runtime


@pytest.fixture
def runtime(loaded: Runtime) -> Iterator[Runtime]:
    yield loaded
    loaded.restore()


def drawn(runtime: Runtime, **more: Any) -> Any:
    embeds = np.random.default_rng(0).standard_normal((1, 77, 32)).astype(np.float32)
    return runtime.sample(prompt_embeds=embeds, seed=1, **more)


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max())


def test_several_equal_the_bundle_with_them_fused(made: Made, runtime: Runtime) -> None:
    first, second = made.lora("first.safetensors", rank=2, seed=1), made.lora("second.safetensors", style="peft")
    with made.fused("large", "unet-sd", f"{first}:0.5,{second}") as other:
        want = drawn(other).latents
    before = drawn(runtime).latents
    assert not close(before, want), "they have an effect"
    runtime.swap_lora("large", f"{first}:0.5,{second}")
    result = drawn(runtime)
    assert close(result.latents, want)
    assert result.loras == runtime.loras == {"large": "first.safetensors:0.5,second.safetensors:1"}
    # The same, said otherwise, and in place of another: nothing of that is left.
    runtime.swap_lora("large", made.lora("third.safetensors", seed=9))
    assert not close(drawn(runtime).latents, want)
    runtime.swap_lora("large", [(first, 0.5), second])
    assert np.array_equal(drawn(runtime).latents, result.latents)
    runtime.restore("large")
    again = drawn(runtime)
    assert np.array_equal(again.latents, before)
    assert again.loras == {}


def test_one_of_hugging_face(made: Made, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    style = made.lora("style.safetensors")
    runtime.swap_lora("large", f"{style}:0.5")
    want = drawn(runtime).latents
    with running_hub(monkeypatch, tmp_path) as hub:
        hub.publish("org/styles", {"a/style.safetensors": style.read_bytes()}, "v2")
        hub.sends = lambda content: [runtime.restore("large", timeout=1) or content]  # a download holds nobody up
        runtime.swap_lora("large", "org/styles/a/style.safetensors@v2:0.5")
        hub.sends = lambda content: [content]
        assert runtime.loras == {"large": "style.safetensors:0.5"}
        assert np.array_equal(drawn(runtime).latents, want)
        with pytest.raises(BadInput, match="no file or folder of this name"):
            runtime.swap_lora("large", "org/absent")
        with pytest.raises(BadInput, match="does not exist"):
            runtime.swap_lora("large", Path("org/styles/a/style.safetensors"))


def test_for_the_time_of_a_block(made: Made, runtime: Runtime) -> None:
    style, other = made.lora("style.safetensors"), made.lora("other.safetensors", style="processors", seed=8)
    before = drawn(runtime).latents
    runtime.swap_lora("large", f"{other}:0.3")
    with_other = drawn(runtime).latents
    with runtime.lora("large", style) as same:
        assert same is runtime
        assert runtime.loras == {"large": "style.safetensors:1"}
        assert not close(drawn(runtime).latents, with_other)
    assert np.array_equal(drawn(runtime).latents, with_other)
    with pytest.raises(BadInput, match="prompt"), runtime.lora("large", style):
        runtime.sample(labels=[0])
    assert np.array_equal(drawn(runtime).latents, with_other)
    runtime.restore()
    assert np.array_equal(drawn(runtime).latents, before)


def test_a_block_is_for_no_other_thread(made: Made, runtime: Runtime) -> None:
    """Blocks of several threads, begun while others are open: each draws with its own LoRA, and none is left."""
    styles = [made.lora("style.safetensors"), made.lora("other.safetensors", style="processors", seed=8)]
    before = drawn(runtime).latents
    alone = []
    for style in styles:
        with runtime.lora("large", style):
            alone.append(drawn(runtime).latents)

    def in_block(style: Path) -> np.ndarray:
        with runtime.lora("large", style):
            return np.asarray(drawn(runtime).latents)

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(in_block, style) for style in styles * 3]
        plain = [threads.submit(drawn, runtime) for _ in range(4)]
        for call, want in zip(running, alone * 3, strict=True):
            assert np.array_equal(call.result(), want)
        for each in plain:
            assert np.array_equal(each.result().latents, before)
    assert runtime.loras == {}


def test_the_text_encoder_s_part(made: Made, runtime: Runtime) -> None:
    both = made.lora("both.safetensors", text=made.text)

    def read(runtime: Runtime) -> np.ndarray:
        return runtime.sample(prompt="a photo of an astronaut", seed=1).latents

    with made.fused("text_encoder", "clip-text", f"{both}:0.7") as other:
        want = read(other)
    before = read(runtime)
    with runtime.lora("text_encoder", f"{both}:0.7"):
        assert close(read(runtime), want)
        assert not close(before, want)
    assert np.array_equal(read(runtime), before)


def test_what_is_refused_changes_nothing(made: Made, runtime: Runtime, tmp_path: Path) -> None:
    runtime.swap_lora("large", made.lora("kept.safetensors"))
    before = drawn(runtime).latents
    wide = unet_folder(tmp_path, "least", block_out_channels=(64,))
    cases: list[tuple[str, Any, type[TStitchError], str]] = [
        ("large", lora_file(tmp_path / "wide.safetensors", wide), BadCheckpoint, "is a LoRA for another model"),
        ("large", tmp_path / "none.safetensors", BadInput, "does not exist"),
        ("large", [("style.safetensors", "much")], BadInput, "a weight of files is 'much'"),
        ("large", 3, BadInput, "files is 3; allowed are a text"),
        ("large", "", BadInput, "no LoRA is given"),
        ("large", [(made.lora("style.safetensors"), float("nan"))], BadInput, "a weight of files is nan"),
        ("large", f"{made.lora('style.safetensors')}:1e39", BadCheckpoint, "can't hold"),
        ("big", made.lora("style.safetensors"), UnknownName, "unknown network 'big'"),
    ]
    for name, files, kind, words in cases:
        with np.errstate(over="ignore"), pytest.raises(kind, match=words):
            runtime.swap_lora(name, files)
        assert runtime.loras == {"large": "kept.safetensors:1"}
        assert np.array_equal(drawn(runtime).latents, before)


def test_an_engine_that_fails_half_way(made: Made, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is put back; where that fails too nothing is drawn from weights that nobody knows."""
    before = drawn(runtime).latents
    engine: Any = runtime._engines["large"]
    real, failures = engine._refit, [1]

    def half(weights: Any, others: Any) -> None:
        if failures:
            failures.pop()
            some = dict(list(weights.items())[: len(weights) // 2])
            real(some, others)
            raise FailedWork("out of memory", hint="none")
        real(weights, others)

    monkeypatch.setattr(engine, "_refit", half)
    style = made.lora("style.safetensors")
    with pytest.raises(FailedWork, match="out of memory"):
        runtime.swap_lora("large", style)
    assert runtime.loras == {}
    assert np.array_equal(drawn(runtime).latents, before)
    failures += [1, 1]
    with pytest.raises(FailedWork, match="out of memory"):
        runtime.swap_lora("large", style)
    with pytest.raises(FailedWork, match=r"the weights of 'large' are not known .*out of memory"):
        drawn(runtime)
    runtime.restore("large")
    assert np.array_equal(drawn(runtime).latents, before)


def test_not_while_sampling(made: Made, runtime: Runtime) -> None:
    style = made.lora("style.safetensors")
    embeds = np.zeros((1, 77, 32), np.float32)
    walk = runtime.iterate(prompt_embeds=embeds, seed=1)
    next(walk)
    for call in (lambda: runtime.swap_lora("large", style), lambda: runtime.restore("large")):
        with pytest.raises(Busy, match="own request"):
            call()
    walk.close()
    thread = threading.Thread(target=lambda: runtime.swap_lora("large", style))
    thread.start()
    thread.join()
    assert runtime.loras == {"large": "style.safetensors:1"}


class Initialisers(Engine):
    """Takes weights as TensorRT does, by the names in the graph, and keeps them."""

    refit_names = "initialiser"

    def _refit(self, weights: Mapping[str, NDArray[Any]], others: Mapping[str, NDArray[Any]]) -> None:
        self.given, self.others = {name: values.copy() for name, values in weights.items()}, others

    def _bind(self, buffers: Any, batch: int) -> None: ...
    def enqueue(self) -> None: ...
    def close(self) -> None: ...


def test_weights_by_their_names_in_the_graph(made: Made) -> None:
    """What an engine is given is the graph of a build with the LoRA fused, in place of the bundle's."""
    import onnx

    bundle = open_bundle(made.folder / "plain.bundle")
    network = bundle.manifest.members["large"]
    engine = Initialisers(network.inputs, network.outputs, network.engines[0].identity.profile)
    changed: list[str] = []
    loras = Loras(bundle, "a stand-in", {"large": engine}, changed.append)
    style = made.lora("style.safetensors")
    loras.swap("large", f"{style}:0.5")
    graph = onnx.load(bundle.path(network.onnx[0])).graph
    before = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    family = open_family("unet-sd")
    inspection = family.inspect(made.folder / "pipeline", {"lora": f"{style}:0.5"})
    fused = [parameter.numpy() for parameter in family.load(inspection).parameters()]
    layers = sum(name.endswith("lora_down.weight") for name in load_file(style))
    assert len(engine.given) == layers
    renamed = 0
    for name, values in engine.given.items():
        assert values.shape == before[name].shape
        assert not np.array_equal(values, before[name])
        same = [p for p in fused if p.shape == values.shape and np.allclose(p, values, rtol=0, atol=1e-6)]
        turned = [p for p in fused if p.ndim == 2 and p.T.shape == values.shape and np.allclose(p.T, values, atol=1e-6)]
        assert same or turned, name
        renamed += not same
    assert renamed > 5
    assert all(np.array_equal(engine.others[name], before[name]) for name in before if name in engine.others)
    assert set(before) - set(engine.others) == set()
    given = set(engine.given)
    loras.restore("large")
    assert set(engine.given) == given
    assert all(np.array_equal(values, before[name]) for name, values in engine.given.items())
    assert changed == ["large", "large"]


def test_the_command_line(made: Made, runtime: Runtime, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    style, other = made.lora("style.safetensors"), made.lora("other.safetensors", seed=3)
    text = "a photo of a horse"
    with runtime.lora("large", f"{style}:0.5,{other}"):
        want = runtime.sample(prompt=text, seed=4).latents
    run, latents = Command(capfd), tmp_path / "latents.npy"
    words = ["sample", made.folder / "plain.bundle", "--backend", "torch", "--prompt", text, "--seed", 4]
    words += ["--latents-out", latents]
    done = run(*words, "--lora", f"large={style}:0.5", "--lora", f"large={other}", "--json")
    assert done.code == 0, done.err
    assert done.json["loras"] == {"large": "style.safetensors:0.5,other.safetensors:1"}
    assert close(np.load(latents), want)
    refused(run(*words, "--lora", str(style)), "is not NAME=FILE[:WEIGHT]")
    refused(run(*words, "--lora", f"big={style}"), "unknown network 'big'")


def test_where_engines_can_t(made: Made) -> None:
    style = made.lora("style.safetensors")
    bundle = made.build(backend="onnxruntime")
    with (
        tstitch_trt.load(bundle, backend="onnxruntime") as runtime,
        pytest.raises(BadInput, match=r"'large' runs on onnxruntime and can't be given a LoRA now") as raised,
    ):
        runtime.swap_lora("large", style)
    assert "--lora" in raised.value.hint
    assert "--backend torch" in raised.value.hint


def test_a_bundle_without_a_map(made: Made, runtime: Runtime) -> None:
    bundle = open_bundle(made.folder / "plain.bundle")
    assert set(bundle.manifest.members["large"].files) == {"weights"}
    bundle.manifest.members["large"].files.clear()
    loras = Loras(bundle, "torch", runtime._engines, lambda name: None)
    with pytest.raises(Unavailable, match="has no map of the weights of 'large'"):
        loras.swap("large", made.lora("style.safetensors"))
