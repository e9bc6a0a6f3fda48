"""PyTorch as a backend: runs a member's exported program, as it is or compiled. The oracle of the other backends."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import numpy as np

from tstitch_engines.backends.base import Backend, CompileJob, Engine
from tstitch_engines.backends.torch_archive import check_archive
from tstitch_engines.backends.torch_compile import MODES, compile_program, mode_of, need_toolchain
from tstitch_engines.backends.torch_cuda import EXACT, WORKSPACES, pool_of
from tstitch_engines.device.open import parse_device
from tstitch_engines.device.recording import RECORDING
from tstitch_engines.errors import (
    BadEngine,
    BadInput,
    BuildFailed,
    FailedWork,
    TStitchError,
    Unavailable,
    Unsafe,
    first_line,
)
from tstitch_engines.needs import require
from tstitch_engines.quiet import silence_output
from tstitch_engines.spec import storage_dtype
from tstitch_engines.threads import check_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tstitch_engines.bundle.manifest import EngineIdentity, Network
    from tstitch_engines.device.base import Buffer, Device

__all__ = ["TorchBackend"]

_log = logging.getLogger(__name__)

_REBUILD = "build the bundle again: tstitch-trt build RECIPE --backend torch --fresh -o BUNDLE"


class TorchBackend(Backend):
    """An engine is a ``torch.export`` archive (.pt2). It runs operator by operator, or compiled by TorchInductor.

    Compiled code is for one machine and for exact sizes. So it is made where it runs, when an engine is first bound to
    buffers of a size (``Engine.jit_ms`` says how long that took), and kept in a cache.
    """

    name = "torch"
    model_kind = "exported-program"
    engine_suffix = ".pt2"
    runs_code = "PyTorch evaluates expressions and looks up operators that the program names"
    options: ClassVar[Mapping[str, tuple[type, str]]] = {
        "compile": (
            str,
            f"{', '.join(MODES)} (or true): compile the program with TorchInductor for each batch size, when that "
            "is first used; max-autotune without its own CUDA graphs, which can't run inside ours (default: false)",
        )
    }

    def __init__(self) -> None:
        self._torch = require("torch", "the backend 'torch'")

    def version(self) -> str:
        return str(self._torch.__version__)

    def arch(self, device: str) -> str:
        """An exported program runs on any machine: only the kind of device is noted."""
        kind, index = parse_device(device)
        self._require(kind, index)
        return kind

    def compile_here(self, **job: Unpack[CompileJob]) -> tuple[Path, ...]:
        """Keeps the program as it is, after loading it once to see that it is whole."""
        model, output = job["model"], job["output"]
        if mode_of(job["options"].get("compile")) is not None:
            need_toolchain(parse_device(job["device"])[0])
        job["progress"]("check", 0.0)
        try:
            self._program(model)
            shutil.copyfile(model, output)
        except (OSError, Unsafe):
            raise
        except Exception as error:
            raise BuildFailed(
                f"{model.name} is no exported program that PyTorch {self.version()} can load: {first_line(error)}",
                hint="build again with an empty cache: TSTITCH_TRT_CACHE=DIR tstitch-trt build RECIPE --backend torch",
            ) from error
        job["progress"]("check", 1.0)
        return (output,)

    def load(
        self,
        path: Path,
        *,
        member: Network,
        identity: EngineIdentity,
        device: Device,
        threads: int,
        beside: Collection[str] = (),
    ) -> Engine:
        """Loads a program. ``threads`` sets PyTorch's CPU threads for the whole process, as PyTorch has it.

        Raises ``Unavailable`` for one to be compiled where there is no compiler.
        """
        kind, index = parse_device(device.name)
        self._require(kind, index)
        mode = mode_of(identity.options.get("compile"))
        if mode is not None:
            need_toolchain(kind)
        try:
            program = self._program(path)
        except TStitchError:
            raise
        except Exception as error:
            raise BadEngine(
                f"PyTorch {self.version()} can't load the engine {path.name}: {first_line(error)}", hint=_REBUILD
            ) from error
        if check_threads(threads):
            self._torch.set_num_threads(threads)
        if kind == "cuda":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device.name)
        return _TorchEngine(self._torch, program.module(), member, identity, device, mode=mode, threads=threads)

    def _program(self, path: Path) -> Any:
        """Raises ``Unsafe`` for pickled objects, trusted or not, and whatever PyTorch raises."""
        check_archive(self._torch, path)
        with silence_output():  # torch.export announces deprecations, and prints tracebacks of what it then raises
            return self._torch.export.load(path)

    def _require(self, kind: str, index: int) -> None:
        if kind == "cuda" and self._torch.cuda.device_count() <= index:
            raise Unavailable(
                f"PyTorch {self.version()} sees {self._torch.cuda.device_count()} CUDA devices; wanted is cuda:{index}",
                hint="use --device cpu, or install a PyTorch with CUDA; tstitch-trt doctor says more",
            )


class _TorchEngine(Engine):
    """Unlike other engines this one allocates while it runs: PyTorch makes every intermediate tensor anew.

    On CUDA the tensors come from a pool that all these engines of a device share and that is large enough after the
    first runs. So a run can be recorded: it allocates nothing, and nobody else gets the memory that the graph uses
    (https://docs.pytorch.org/docs/stable/notes/cuda.html, "Graph memory management"; ``torch.cuda.use_mem_pool`` does
    for our recording what ``torch.cuda.graph`` does there). Engines may share memory because they run one after
    another on one stream and no tensor outlives its run. cuBLAS's workspace of this stream comes from the pool too,
    so that it is never freed under a graph (PyTorch issue 193402); therefore compiling, whose trials multiply
    matrices, uses another stream. Not run on a GPU.
    """

    refit_names = "parameter"
    refit_keeps_recordings = True
    warmups = 3  # as torch.cuda.make_graphed_callables does: libraries choose algorithms and workspaces

    def __init__(
        self,
        torch: Any,
        module: Any,
        member: Network,
        identity: EngineIdentity,
        device: Device,
        *,
        mode: str | None,
        threads: int,
    ) -> None:
        super().__init__(member.inputs, member.outputs, identity.profile)
        self._torch = torch
        self._module = module
        self._mode = mode
        self._threads = threads
        self._float32 = identity.precision == "fp32"
        self._kind = parse_device(device.name)[0]
        self._device = device
        self._stream: Any = None
        self._pool: Any = None
        if self._kind == "cuda":
            stream = getattr(device, "stream_handle", None)
            self._stream = torch.cuda.ExternalStream(stream, device=device.name)
            self._pool = pool_of(torch, device, self._stream.device)
            WORKSPACES.hold(self)
        self._compiled: dict[tuple[tuple[str, int], ...], Callable[..., None]] = {}
        self._run: Callable[..., None] = self._eager
        self._arguments: list[Any] = []
        self._results: list[Any] = []
        self._buffers: dict[str, Buffer] = {}

    def _bind(self, buffers: Mapping[str, Buffer], batch: int) -> None:
        """Compiles the first time these sizes are met, if the engine is one that is compiled; that waits."""
        if self._mode is not None:
            key = tuple(sorted(self.sizes.items()))
            if key not in self._compiled:
                with RECORDING:
                    self._compiled[key] = self._compile(self._mode)
            self._run = self._compiled[key]
        self._arguments = [self._view(buffers[spec.name]) for spec in self.inputs]
        self._results = [self._view(buffers[spec.name]) for spec in self.outputs]
        self._buffers = dict(buffers)  # the views do not own the memory

    def enqueue(self) -> None:
        if not self._arguments:
            raise BadInput("the engine has no buffers", hint="call bind(...) before enqueue()")
        torch = self._torch
        try:
            with torch.inference_mode():
                if self._stream is None:
                    self._run(*self._results, *self._arguments)
                else:
                    with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool), self._exact():
                        self._run(*self._results, *self._arguments)
        except RuntimeError as error:
            raise FailedWork(
                f"PyTorch failed while running a member: {first_line(error)}",
                hint="check the free memory: a smaller batch needs less",
            ) from error

    def _refit(self, weights: Mapping[str, NDArray[Any]], others: Mapping[str, NDArray[Any]]) -> None:
        """Into the parameters in place: compiled code and recordings hold their addresses."""
        torch = self._torch
        parameters = dict(self._module.named_parameters())
        self._device.synchronize()
        for name, values in weights.items():
            parameter = parameters.get(name)
            if parameter is None:
                raise BadEngine(f"the exported program has no parameter {name}", hint=_REBUILD)
            given = torch.from_numpy(values)
            if parameter.dtype == torch.bfloat16:
                given = given.view(torch.bfloat16)
            if (given.shape, given.dtype) != (parameter.shape, parameter.dtype):
                raise BadEngine(
                    f"{name} is {parameter.dtype}{list(parameter.shape)} in the exported program, "
                    f"given is {given.dtype}{list(given.shape)}",
                    hint=_REBUILD,
                )
            with torch.no_grad():
                parameter.copy_(given)
        if self._stream is not None:  # the copies are on PyTorch's stream
            torch.cuda.current_stream(self._stream.device).synchronize()

    def _eager(self, *tensors: Any) -> None:
        count = len(self.outputs)
        values = self._module(*tensors[count:])
        values = values if isinstance(values, tuple) else (values,)
        for target, value in zip(tensors[:count], values, strict=True):
            target.copy_(value)

    def _compile(self, mode: str) -> Callable[..., None]:
        sizes = ", ".join(f"{name} = {size}" for name, size in sorted(self.sizes.items()))
        what = f"the program for {sizes} on {self._device.name}"
        _log.info("compiling %s (%s)", what, mode)
        started = perf_counter()
        # Zeros, not what the buffers hold: a class out of range would end the process's use of the GPU.
        specs = (*self.outputs, *self.inputs)
        buffers = [self._device.empty(spec.resolve(self.sizes), spec.dtype) for spec in specs]
        for buffer in buffers:
            self._device.upload(buffer, np.zeros(buffer.shape, storage_dtype(buffer.dtype)))
        tensors = [self._view(buffer) for buffer in buffers]
        count = len(self.outputs)
        with ExitStack() as stack:
            if self._stream is not None:
                cuda = self._torch.cuda
                self._device.synchronize()
                stack.enter_context(cuda.device(self._stream.device))
                stack.enter_context(cuda.stream(cuda.Stream()))
                stack.enter_context(self._exact())
            run = compile_program(
                self._torch,
                self._module,
                mode=mode,
                results=tensors[:count],
                arguments=tensors[count:],
                threads=self._threads,
                what=what,
            )
        if self._stream is not None:
            # Inside a pool PyTorch does not give back what it keeps elsewhere to make room (its issue 159674).
            self._torch.cuda.empty_cache()
        spent = 1e3 * (perf_counter() - started)
        self.jit_ms += spent
        _log.info("compiled %s in %.1f s", what, spent / 1e3)
        return run

    def _exact(self) -> AbstractContextManager[None]:
        """In float32 no TF32 in convolutions.

        Matrix products follow ``torch.set_float32_matmul_precision``, by default without.
        """
        return EXACT(self._torch) if self._float32 else nullcontext()

    def _view(self, buffer: Buffer) -> Any:
        """The buffer's memory as a tensor, without a copy (bfloat16 through its 16 bits)."""
        bits = {"bfloat16": "int16"}.get(buffer.dtype, buffer.dtype)
        memory = _Memory(buffer, bits)
        if self._kind == "cpu":
            tensor = self._torch.from_numpy(np.asarray(memory))
        else:
            tensor = self._torch.as_tensor(memory, device=self._device.name)
        return tensor.view(getattr(self._torch, buffer.dtype))

    def scratch(self) -> Mapping[int, int]:
        if self._pool is None:
            return {}
        return {int(part["address"]): int(part["total_size"]) for part in self._pool.snapshot()}

    def close(self) -> None:
        self._module = None
        self._compiled = {}
        self._run = self._eager
        self._arguments, self._results, self._buffers = [], [], {}
        if self._pool is not None:
            WORKSPACES.release(self._torch, self)
        self._pool = None


class _Memory:
    """A buffer as numpy's and CUDA's array interfaces describe one: an address, a shape and a type."""

    def __init__(self, buffer: Buffer, bits: str) -> None:
        description = {"shape": buffer.shape, "typestr": np.dtype(bits).str, "data": (buffer.ptr, False), "version": 3}
        self.__array_interface__ = self.__cuda_array_interface__ = description
