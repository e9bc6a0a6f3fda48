"""The backends ``tensorrt`` and ``tensorrt-rtx``."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import msgspec

from tstitch_engines.backends.base import BUILD_SECONDS, Backend, CompileJob, Engine
from tstitch_engines.backends.tensorrt.api import has
from tstitch_engines.backends.tensorrt.estimate import estimate, recorded
from tstitch_engines.backends.tensorrt.flavour import RTX, TENSORRT, Flavour
from tstitch_engines.backends.tensorrt.layers import layers_file
from tstitch_engines.backends.tensorrt.library import open_library
from tstitch_engines.backends.tensorrt.messages import Request
from tstitch_engines.backends.tensorrt.options import (
    DEFAULT_LIST,
    DEFAULT_WORD,
    HARDWARE,
    OPTIONS,
    UNRECORDED,
    BuildOptions,
    list_arch,
    require_float8,
    resolve,
)
from tstitch_engines.backends.tensorrt.plan import check_plan
from tstitch_engines.backends.tensorrt.plan_header import read_plan_header
from tstitch_engines.backends.tensorrt.worker import compile_engine
from tstitch_engines.bundle.cache import Cache
from tstitch_engines.bundle.identity import model_digest
from tstitch_engines.bundle.manifest import Option
from tstitch_engines.child import DEFAULT, Job, free_memory, run_in_child, show_size
from tstitch_engines.device.cuda import gpu_and_driver
from tstitch_engines.device.open import parse_device
from tstitch_engines.errors import BuildFailed, OutOfMemory, Unavailable

if TYPE_CHECKING:
    from tstitch_engines.bundle.manifest import EngineIdentity, Network
    from tstitch_engines.device.base import Device
    from tstitch_engines.device.cuda import CudaDevice

__all__ = ["TensorRtBackend", "open_tensorrt", "open_tensorrt_rtx"]

_log = logging.getLogger(__name__)


class TensorRtBackend(Backend):
    """TensorRT or TensorRT-RTX, strongly typed: precision is what the ONNX says.

    TensorRT compiles on the GPU it is for. TensorRT-RTX compiles anywhere: ``device="cpu"`` for the library's own list
    of GPUs, ``cuda:N`` for that GPU alone, and with the option ``compute-capabilities`` for those in either case.
    """

    options = OPTIONS
    unrecorded = UNRECORDED
    runs_code = "a plan is machine code, and may bring libraries of its own"

    def __init__(self, flavour: Flavour) -> None:
        self.flavour = flavour
        self.name = flavour.name
        self.engine_suffix = flavour.suffix
        self._library = open_library(flavour)

    def version(self) -> str:
        return self._library.__version__

    def arch(self, device: str) -> str:
        kind, index = parse_device(device)
        if kind == "cpu":
            more = ", though it compiles here (tstitch-trt build)" if self.flavour.compiles_without_gpu else ""
            raise Unavailable(
                f"{self.flavour.title} runs on NVIDIA GPUs only{more}; the device asked for is {device!r}",
                hint="use --device cuda, or --backend onnxruntime on the CPU",
            )
        from tstitch_engines.device.cuda import compute_capability

        return "sm_{}{}".format(*compute_capability(index))

    def build_arch(self, device: str, options: Mapping[str, Option]) -> str:
        return self._arch_of(resolve(self.flavour, self._library, options, device), device)

    def _arch_of(self, chosen: BuildOptions, device: str) -> str:
        return list_arch(chosen.capabilities) if self.flavour.compiles_without_gpu else self.arch(device)

    def build_gpu(self, device: str, options: Mapping[str, Option]) -> str | msgspec.UnsetType:
        """TensorRT times kernels on a GPU and calls a plan on another model unsupported, even of one architecture.

        (Its warning: "may affect performance or even cause errors or deadlock".) Of none with
        ``hardware-compatible``, and TensorRT-RTX's plans are for every GPU in their list.
        """
        kind, index = parse_device(device)
        portable = HARDWARE.get(str(options.get("hardware-compatible", "none"))) is not None
        if kind == "cpu" or self.flavour.compiles_without_gpu or portable:
            return msgspec.UNSET
        return gpu_and_driver(index)[0]

    def driver(self, device: str) -> str | msgspec.UnsetType:
        """Of plans compiled on a GPU. What TensorRT asks of it is a minimum, by the version of CUDA."""
        kind, index = parse_device(device)
        return msgspec.UNSET if kind == "cpu" or self.flavour.compiles_without_gpu else gpu_and_driver(index)[1]

    def options_for(self, options: Mapping[str, Option], device: str) -> dict[str, Option]:
        """A list of compute capabilities gets that of the GPU it is to run on; those it has stay."""
        found = dict(options)
        if found.get("compute-capabilities", DEFAULT_WORD) != DEFAULT_WORD and parse_device(device)[0] == "cuda":
            major, minor = _capability(self.arch(device))
            listed = [word.strip() for word in str(found["compute-capabilities"]).split(",")]
            if f"{major}.{minor}" not in listed:
                found["compute-capabilities"] = ",".join([*listed, f"{major}.{minor}"])
        return found

    def refused(self, identity: EngineIdentity, device: str) -> Mapping[str, str]:
        reasons = dict(super().refused(identity, device))
        if identity.options.get("weight-streaming"):
            reasons["graph"] = "its engine streams weights, which allocates while it runs and can't be recorded"
        return reasons

    def opset_limits(self, options: Mapping[str, Option]) -> tuple[int, int, str]:
        if options.get("attention") == "apart":
            return 20, 22, "with attention=apart attention has to be products and softmax, as up to opset 22"
        if not has(self._library, "IAttention"):
            return (
                20,
                22,
                f"{self.flavour.title} {self.version()} imports no Attention, the node of opset 23",
            )
        if options.get("attention") == "fused":
            return 23, 23, "with attention=fused attention has to be one node, as from opset 23 on"
        return super().opset_limits(options)

    def doubt(self, identity: EngineIdentity) -> str:
        if identity.precision == "fp32" or identity.options.get("attention") == "apart":
            return ""
        return (
            "fused attention kernels have computed wrongly before (NVIDIA/TensorRT issues 4732 and 4837): build it "
            "again from the recipe or checkpoints with --option attention=apart, which has none, and compare"
        )

    def check_file(self, path: Path, device: str) -> None:
        on_gpu = parse_device(device)[0] == "cuda"
        check_plan(self.flavour, self.version(), path, _capability(self.arch(device)) if on_gpu else None)

    def current_identity(self, identity: EngineIdentity, device: str) -> EngineIdentity:
        """A TensorRT-RTX plan is for every GPU it lists; TensorRT's are as compatible as they were asked to be."""
        version, arch, options = self.version(), self.arch(device), identity.options
        gpu = identity.gpu if identity.gpu is msgspec.UNSET else self.build_gpu(device, options)
        if self.flavour.compiles_without_gpu:
            # Of the default list only the plan's own header tells: `load` looks there.
            if identity.arch == DEFAULT_LIST or arch in identity.arch.split(","):
                arch = identity.arch
        elif options.get("hardware-compatible") == "ampere+" and _capability(arch) >= (8, 0):
            arch = identity.arch
        if options.get("version-compatible") and _numbers(identity.backend_version) <= _numbers(version):
            version = identity.backend_version
        return msgspec.structs.replace(identity, backend_version=version, arch=arch, gpu=gpu)

    def _compile(self, job: CompileJob) -> tuple[Path, ...]:
        flavour, member, model, device = self.flavour, job["member"], job["model"], job["device"]
        kind, index = parse_device(device)
        if kind == "cpu" and not flavour.compiles_without_gpu:
            self.arch(device)
        chosen = resolve(flavour, self._library, job["options"], device)
        arch = self._arch_of(chosen, device)
        if member.precision == "fp8":
            require_float8(flavour, arch)
        if chosen.weight_streaming and has(self._library, "BuilderFlag.REQUIRE_USER_ALLOCATION"):
            _log.warning("weight-streaming: the engine allocates while it runs, so its steps can't be captured")
        request = Request(
            flavour=flavour.name,
            model=str(model.absolute()),
            output=str(job["output"].absolute()),
            family=member.family,
            precision=member.precision,
            inputs=member.inputs,
            outputs=member.outputs,
            profile=job["profile"],
            options=chosen,
            gpu=None if kind == "cpu" else index,
        )
        weights = sum(part.bytes for part in member.onnx)
        timed = not flavour.compiles_without_gpu
        expected = estimate(
            weights,
            streamed=has(self._library, "Builder.build_serialized_network_to_stream"),
            timed=timed,
            onnx_sha256=model_digest(member.onnx),
            builds=recorded(Cache().stored(), backend=self.name, arch=arch),
        )
        _log.info("compiling %s with %s %s: %s", model.name, flavour.title, self.version(), expected)
        if timed:
            _log.info("timing kernels: %s", _timings(chosen.timing_cache))
        limits, free = job.get("limits", DEFAULT), free_memory()
        if limits.memory is not None and expected.memory > limits.memory:
            raise OutOfMemory(
                f"compiling {model.name} needs {expected}; its limit is {show_size(limits.memory)}",
                hint="raise --memory-limit (memory_limit=), or build on a larger machine and copy the bundle",
            )
        if free is not None and expected.memory > free:
            _log.warning(
                "compiling %s needs %s and only %.1f GiB are free: the kernel may end it; free memory, or build on a "
                "larger machine and copy the bundle",
                model.name,
                expected,
                free / 2**30,
            )
        started = perf_counter()
        peak: list[int] = []
        done = run_in_child(
            compile_engine,
            request,
            Job(
                what=f"the process compiling {model.name}",
                seconds=BUILD_SECONDS,
                limits=limits,
                error=BuildFailed,
                needs=f"; it needs {expected}",
                if_killed="free memory, or build on a machine with more and copy the bundle",
                if_crashed="the library crashed: try another precision or version of it, and report this message",
                kept=False,
                host_only=kind == "cpu",
            ),
            progress=job["progress"],
            on_done=peak.append,
        )
        _log.info(
            "compiled %s: %.1f MiB in %.1f s, at most %.1f GiB of memory",
            model.name,
            done.bytes / 2**20,
            perf_counter() - started,
            peak[0] / 2**30,
        )
        if done.attention and (note := job.get("note")) is not None:
            note("attention", done.attention)
        return (job["output"], layers_file(job["output"])) if done.layers else (job["output"],)

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
        """Loads a plan onto a GPU (not run on one). ``threads`` means nothing here.

        Raises ``BadEngine`` for a file that is no whole plan of this flavour and version or not for this GPU, and
        ``Unavailable`` for a device that is no GPU.
        """
        from tstitch_engines.backends.tensorrt.engine import TensorRtEngine

        self.check_file(path, device.name)
        capability = _capability(self.arch(device.name))
        header = read_plan_header(path)
        if header is not None and not header.runs_on(capability):
            _log.warning(
                "the engine %s is for GPUs of compute capability %s and %s has %d.%d: %s may refuse it",
                path.name, header.gpus(), device.name, *capability, self.flavour.title,
            )  # fmt: skip
        return TensorRtEngine(self.flavour, self._library, path, member, identity, cast("CudaDevice", device))


def _timings(path: str | None) -> str:
    if path is None:
        return "all of them, for no timing cache is given (--option timing-cache=FILE spares the next build)"
    try:
        size = Path(path).stat().st_size
    except OSError:
        return f"all of them; {path} is started for the next build"
    return f"those that are not in {path} ({size / 2**20:.1f} MiB)"


def _capability(arch: str) -> tuple[int, int]:
    """``sm_120`` -> ``(12, 0)``."""
    number = int(arch.removeprefix("sm_"))
    return number // 10, number % 10


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


open_tensorrt: Any = partial(TensorRtBackend, TENSORRT)
open_tensorrt_rtx: Any = partial(TensorRtBackend, RTX)
