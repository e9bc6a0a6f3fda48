"""Members compiled by TorchInductor behind the ``torch`` backend: for real on the CPU, on a GPU in ``test_gpu``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from support.manifests import member
from support.recordings import others_may_record
from support.tiny import TinyPair
from tstitch_engines.backends import Engine, open_backend, torch_reference
from tstitch_engines.backends.torch_compile import mode_of
from tstitch_engines.bundle.manifest import SCHEMA, EngineIdentity
from tstitch_engines.compile.load import load_own
from tstitch_engines.device.open import open_device
from tstitch_engines.errors import BadEngine, BadInput, BuildFailed, Unavailable, UnknownName
from tstitch_engines.progress import silent
from tstitch_engines.quiet import silence_output
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_export.build import build
from tstitch_trt.reference.recorder import own_files

PROFILE = ShapeProfile({"B": Range(1, 2, 4)})


class Net(torch.nn.Module):
    """The signature of a member, and few enough operators to be compiled in a second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Linear(256, 256)
        self.embedding = torch.nn.Embedding(11, 256)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = sample.flatten(1)
        mixed = self.mix(x) * torch.cos(timestep / 100)[:, None] + self.embedding(labels)
        return (torch.nn.functional.gelu(mixed) + x).unflatten(1, (4, 8, 8))


MEMBER = member()


class Engines:
    """Engines of one program, compiled and loaded by the backends."""

    def __init__(self, folder: Path) -> None:
        example = (torch.randn(2, 4, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64))
        batch = torch.export.Dim("B", min=1, max=64)
        names = ("sample", "timestep", "labels")
        with silence_output(), torch.no_grad():
            program = torch.export.export(Net().eval(), example, dynamic_shapes={name: {0: batch} for name in names})
            torch.export.save(program, folder / "model.pt2")
            torch.onnx.export(
                program, (), folder / "model.onnx", input_names=names, output_names=["model_output"], verbose=False
            )
        self.folder = folder

    def make(self, backend: str, **options: str) -> Path:
        library = open_backend(backend)
        output = self.folder / f"{'-'.join((backend, *options.values()))}{library.engine_suffix}"
        library.compile(
            member=msgspec.structs.replace(MEMBER, onnx=own_files(self.folder / "model.onnx")),
            model=self.folder / ("model.onnx" if library.model_kind == "onnx" else "model.pt2"),
            profile=PROFILE,
            device="cpu",
            options=options,
            output=output,
            progress=silent,
        )
        return output

    def load(self, backend: str, **options: str) -> Engine:
        library = open_backend(backend)
        identity = EngineIdentity(
            schema=SCHEMA,
            backend=backend,
            backend_version=library.version(),
            onnx_sha256="0" * 64,
            precision="fp32",
            profile=PROFILE,
            arch=library.arch("cpu"),
            options=options,
        )
        device = open_device("cpu")
        output = self.make(backend, **options)
        files = [output, *output.parent.glob(f"{output.name}.*")]
        return load_own(library, files, MEMBER, identity, device, threads=0)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("compile"))


class Call:
    """Buffers of one batch size, filled."""

    def __init__(self, engine: Engine, batch: int) -> None:
        device, rng = open_device("cpu"), np.random.default_rng(batch)
        self.engine, self.batch = engine, batch
        self.buffers = {
            s.name: device.empty(s.resolve({"B": batch}), s.dtype) for s in (*engine.inputs, *engine.outputs)
        }
        sample = self.buffers["sample"]
        device.upload(sample, rng.standard_normal(sample.shape, dtype=np.float32))
        device.upload(self.buffers["timestep"], (rng.random(batch) * 999).astype(np.float32))
        device.upload(self.buffers["labels"], rng.integers(0, 11, batch))
        self._download = device.download

    def bind(self) -> Call:
        self.engine.bind(self.buffers, batch=self.batch)
        return self

    def run(self) -> NDArray[np.float32]:
        self.engine.enqueue()
        return self._download(self.buffers["model_output"])


def test_nobody_records_while_a_program_is_compiled(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def compiling(*_: Any, **__: Any) -> Callable[..., None]:
        seen.append(others_may_record())
        return lambda *tensors: None

    monkeypatch.setattr(torch_reference, "compile_program", compiling)
    engine = engines.load("torch", compile="default")
    Call(engine, 2).bind()
    assert seen == [False]
    Call(engine, 2).bind()
    assert others_may_record()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_a_compiled_member(engines: Engines) -> None:
    """An interrupted compilation, then equality at two sizes, what comes back without compiling, and memory."""

    def interrupt(_: int, frame: Any) -> None:
        while frame is not None:  # Python drops what finalisers raise: in one of them it waits for the next moment
            if frame.f_code.co_name in ("remove", "__del__"):
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    # What TorchInductor imports when it first compiles: setuptools can't be imported again after an interrupted import.
    importlib.import_module("torch.utils.cpp_extension")
    compiled = engines.load("torch", compile="default")
    one = Call(compiled, 1)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)  # it takes more
        with pytest.raises(KeyboardInterrupt):
            one.bind()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    others = [engines.load("torch"), engines.load("onnxruntime")]
    three = Call(compiled, 3)
    for call in (one, three):
        spent = compiled.jit_ms
        call.bind()
        assert compiled.jit_ms > spent
        got = call.run()
        for other in others:
            want = Call(other, call.batch).bind().run()
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert all(other.jit_ms == 0 for other in others)

    spent, memory = compiled.jit_ms, []
    first = {call.batch: call.bind().run().copy() for call in (one, three)}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # a guard of TorchDynamo's, which would compile again
    try:
        for _ in range(2):
            for _ in range(150):
                for call in (one, three):
                    assert np.array_equal(call.bind().run(), first[call.batch])
            memory.append(resident())
    finally:
        torch.set_num_threads(threads)
    assert compiled.jit_ms == spent
    assert memory[1] - memory[0] < 4 << 20

    # Other weights are taken without compiling again; wrong ones are refused.
    rng = np.random.default_rng(9)
    new = {"mix.weight": rng.standard_normal((256, 256), dtype=np.float32)}
    plain = others[0]
    for engine in (compiled, plain):
        engine.refit(new, {})
    got, want = three.run(), Call(plain, 3).bind().run()
    assert np.abs(got - first[3]).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert compiled.jit_ms == spent
    for wrong in ({"mix.weight": np.zeros((2, 2), np.float32)}, {"nothing": np.zeros(2, np.float32)}):
        with pytest.raises(BadEngine, match=next(iter(wrong))):
            compiled.refit(wrong, {})

    # Another engine of the same program finds the code in our cache: nothing new is written into it.
    cache = Path(os.environ["TSTITCH_TRT_CACHE"]) / "torch-inductor"
    code = sorted(cache.rglob("*.so"))
    assert code
    again = Call(engines.load("torch", compile="default"), 3).bind()
    assert np.array_equal(again.run(), first[3])
    assert sorted(cache.rglob("*.so")) == code


def test_the_option_is_part_of_the_identity(tiny_pair: TinyPair, tmp_path: Path) -> None:
    for options in ({}, {"compile": "default"}):
        manifest = build(
            tiny_pair.recipe("small"),
            members={"small": tiny_pair.checkpoint("small")},
            output=tmp_path / "out",
            backend="torch",
            options=options,
        )
        (record,) = manifest.members["small"].engines
        assert record.identity.options == options
        assert record.identity.backend_version == torch.__version__


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        (None, None),
        ("false", None),
        ("true", "default"),
        ("default", "default"),
        ("max-autotune", "max-autotune"),
        ("max-autotune-no-cudagraphs", "max-autotune"),
    ],
)
def test_modes(given: str | None, mode: str | None) -> None:
    assert mode_of(given) == mode


def refusal(tiny_pair: TinyPair, folder: Path, **options: str) -> BadInput:
    with pytest.raises(BadInput) as caught:
        build(
            tiny_pair.recipe("small"),
            members={"small": tiny_pair.checkpoint("small")},
            output=folder / "out",
            backend="torch",
            options=options,
        )
    assert not (folder / "out").exists()
    return caught.value


def test_bad_options(tiny_pair: TinyPair, tmp_path: Path) -> None:
    error = refusal(tiny_pair, tmp_path, compile="max-autotun")
    assert isinstance(error, UnknownName)
    assert "compile mode 'max-autotun'" in error.message
    assert "did you mean 'max-autotune'?" in error.hint
    error = refusal(tiny_pair, tmp_path, compile="reduce-overhead")
    assert "PyTorch's own CUDA graphs" in error.message
    assert "compile=default" in error.hint
    assert "did you mean 'compile'?" in refusal(tiny_pair, tmp_path, compil="true").hint


def test_without_a_compiler(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said when an engine is built, and when one that was built elsewhere is loaded."""
    path = engines.make("torch", compile="default")
    monkeypatch.setenv("CXX", "no-such-compiler")
    for step in ("build", "load"):
        if step == "load":
            monkeypatch.setattr(engines, "make", lambda backend, **options: path)
        with pytest.raises(Unavailable) as caught:
            engines.load("torch", compile="default")
        assert "needs a C++ compiler ('no-such-compiler'), which is not there" in caught.value.message
        assert "apt-get install g++" in caught.value.hint


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from tstitch_engines.backends.torch_compile import need_toolchain

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    with pytest.raises(Unavailable, match="needs Triton on a GPU") as caught:
        need_toolchain("cuda")
    assert "pip install triton" in caught.value.hint


def test_a_compiler_that_fails(engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers ``--version`` and refuses every file, as one without its headers does."""
    import torch._inductor.config as inductor

    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *--version*|*-dumpmachine*|*-print*) exec /usr/bin/g++ "$@";; esac\n'
        'echo "kernel.cpp:1:10: fatal error: Python.h: No such file or directory" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    engine = engines.load("torch", compile="default")
    with inductor.patch({"cpp.cxx": (None, str(compiler))}), pytest.raises(BuildFailed) as caught:
        Call(engine, 2).bind()
    assert "B = 2 on cpu" in caught.value.message
    assert "Python.h" in caught.value.message
    assert "python3-dev" in caught.value.hint
