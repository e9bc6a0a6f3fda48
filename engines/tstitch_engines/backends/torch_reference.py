"""PyTorch as a backend: runs a member's exported program as it is. The oracle and baseline of the other backends."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tstitch_engines.backends.base import Backend, Engine, Option, Progress
from tstitch_engines.device import parse_device
from tstitch_engines.errors import BadEngine, BadInput, BuildFailed, FailedWork, Unavailable, unknown_name
from tstitch_engines.quiet import quiet

if TYPE_CHECKING:
    from tstitch_engines.device import Buffer, Device
    from tstitch_engines.manifest import EngineIdentity, Network
    from tstitch_engines.spec import ShapeProfile

__all__ = ["TorchBackend"]

_REBUILD = "build the bundle again: tstitch-trt build RECIPE --backend torch -o BUNDLE"


class TorchBackend(Backend):
    """An engine is a ``torch.export`` archive (.pt2); it runs eagerly, operator by operator."""

    name = "torch"
    model_kind = "exported-program"
    engine_suffix = ".pt2"
    options = MappingProxyType({})

    def __init__(self) -> None:
        try:
            import torch
        except ImportError as error:
            raise Unavailable(
                "the backend 'torch' needs PyTorch, which is not installed", hint='pip install "tstitch-trt[export]"'
            ) from error
        self._torch: Any = torch

    def version(self) -> str:
        return str(self._torch.__version__)

    def arch(self, device: str) -> str:
        """An exported program runs on any machine: only the kind of device is noted."""
        kind, index = parse_device(device)
        self._require(kind, index)
        return kind

    def compile(
        self,
        *,
        member: Network,
        model: Path,
        profile: ShapeProfile,
        device: str,
        options: Mapping[str, Option],
        output: Path,
        progress: Progress,
    ) -> tuple[Path, ...]:
        """Keeps the program as it is, after loading it once to see that it is whole."""
        for name in options:
            raise unknown_name("torch option", name, self.options)
        progress("check", 0.0)
        try:
            self._program(model)
            shutil.copyfile(model, output)
        except BaseException as error:
            output.unlink(missing_ok=True)
            if not isinstance(error, Exception) or isinstance(error, OSError):
                raise
            raise BuildFailed(
                f"{model.name} is no exported program that PyTorch {self.version()} can load: {_first_line(error)}",
                hint="build again with an empty cache: TSTITCH_TRT_CACHE=DIR tstitch-trt build RECIPE --backend torch",
            ) from error
        progress("check", 1.0)
        return (output,)

    def load(self, path: Path, *, member: Network, identity: EngineIdentity, device: Device, threads: int) -> Engine:
        """Loads a program. ``threads`` sets PyTorch's CPU threads for the whole process, as PyTorch has it."""
        kind, index = parse_device(device.name)
        self._require(kind, index)
        try:
            program = self._program(path)
        except Exception as error:
            raise BadEngine(
                f"PyTorch {self.version()} can't load the engine {path.name}: {_first_line(error)}", hint=_REBUILD
            ) from error
        if threads:
            self._torch.set_num_threads(threads)
        if kind == "cuda":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device.name)
        return _TorchEngine(self._torch, program.module(), member, identity, device)

    def _program(self, path: Path) -> Any:
        with quiet():  # torch.export announces deprecations, and prints tracebacks of what it then raises
            return self._torch.export.load(path)

    def _require(self, kind: str, index: int) -> None:
        if kind == "cuda" and self._torch.cuda.device_count() <= index:
            raise Unavailable(
                f"PyTorch {self.version()} sees {self._torch.cuda.device_count()} CUDA devices; wanted is cuda:{index}",
                hint="use --device cpu, or install a PyTorch with CUDA; tstitch-trt doctor says more",
            )


class _TorchEngine(Engine):
    """Unlike other engines this one allocates while it runs: PyTorch makes every intermediate tensor anew.

    On CUDA it takes them from a pool of its own, which after the first runs holds all it needs. So a run can be
    recorded: nothing is allocated in it, and nobody else is given the memory that the graph goes on using. Runs and
    replays follow each other on one stream and may use the same memory. Not run on a GPU.
    """

    warmups = 3  # as torch.cuda.make_graphed_callables does: libraries choose algorithms and workspaces

    def __init__(self, torch: Any, module: Any, member: Network, identity: EngineIdentity, device: Device) -> None:
        super().__init__(member.inputs, member.outputs, identity.profile)
        self._torch = torch
        self._module = module
        self._kind = parse_device(device.name)[0]
        self._device = device
        self._stream: Any = None
        self._pool: Any = None
        if self._kind == "cuda":
            stream = getattr(device, "stream_handle", None)
            self._stream = torch.cuda.ExternalStream(stream, device=device.name)
            with torch.cuda.device(self._stream.device):
                self._pool = torch.cuda.MemPool()
        self._arguments: list[Any] = []
        self._results: list[Any] = []
        self._buffers: dict[str, Buffer] = {}

    def _bind(self, buffers: Mapping[str, Buffer], batch: int) -> None:
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
                    self._run()
                else:
                    with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
                        self._run()
        except RuntimeError as error:
            raise FailedWork(
                f"PyTorch failed while running a member: {_first_line(error)}",
                hint="check the free memory: a smaller batch needs less",
            ) from error

    def _run(self) -> None:
        outputs = self._module(*self._arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for target, value in zip(self._results, outputs, strict=True):
            target.copy_(value)

    def _view(self, buffer: Buffer) -> Any:
        """The buffer's memory as a tensor, without a copy (bfloat16 through its 16 bits)."""
        bits = {"bfloat16": "uint16"}.get(buffer.dtype, buffer.dtype)
        memory = _Memory(buffer, bits)
        if self._kind == "cpu":
            import numpy as np

            tensor = self._torch.from_numpy(np.asarray(memory))
        else:
            tensor = self._torch.as_tensor(memory, device=self._device.name)
        return tensor.view(getattr(self._torch, buffer.dtype))

    def close(self) -> None:
        self._module = None
        self._arguments, self._results, self._buffers = [], [], {}
        self._pool = None


class _Memory:
    """A buffer as numpy's and CUDA's array interfaces describe one: an address, a shape and a type."""

    def __init__(self, buffer: Buffer, bits: str) -> None:
        import numpy as np

        description = {
            "shape": buffer.shape,
            "typestr": np.dtype(bits).str,
            "data": (buffer.ptr, False),
            "version": 3,
        }
        self.__array_interface__ = self.__cuda_array_interface__ = description


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
