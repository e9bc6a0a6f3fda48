"""ONNX Runtime: the CPU provider, and the CUDA provider behind the same class. An engine is the optimised graph.

Its TensorRT provider is a baseline for our own (``--option provider=tensorrt``; not run on a GPU). It compiles when the
engine is loaded and keeps what it compiled in our cache.
"""

from __future__ import annotations

import importlib.util
import logging
import platform
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Unpack

from tstitch_engines.backends.base import Backend, CompileJob, Engine
from tstitch_engines.backends.onnx_session import open_session
from tstitch_engines.bundle.cache import default_root
from tstitch_engines.bundle.identity import digest
from tstitch_engines.bundle.manifest import siblings
from tstitch_engines.device.open import parse_device
from tstitch_engines.device.recording import RECORDING
from tstitch_engines.driver import fitting_extra
from tstitch_engines.errors import (
    BadEngine,
    BadInput,
    BuildFailed,
    FailedWork,
    TStitchError,
    Unavailable,
    unknown_name,
)
from tstitch_engines.needs import require
from tstitch_engines.quiet import silence_output
from tstitch_engines.spec import ONNX_TYPES
from tstitch_engines.threads import check_threads, default_threads

if TYPE_CHECKING:
    from tstitch_engines.bundle.manifest import EngineIdentity, Network
    from tstitch_engines.device.base import Buffer, Device

__all__ = ["OnnxRuntimeBackend", "copies_of", "tensorrt_options"]

_log = logging.getLogger(__name__)

_NOT_WRITTEN: Final = ("Failed to write", "Protobuf serialization failed")  # how it reports a full disk
_PROVIDERS: Final = ("cuda", "tensorrt")
_TENSORRT: Final = "TensorrtExecutionProvider"
_LEVELS: Final = {"all": "ORT_ENABLE_ALL", "extended": "ORT_ENABLE_EXTENDED", "basic": "ORT_ENABLE_BASIC"}


def cpu_arch() -> str:
    """The machine's instruction set as far as compiled graphs depend on it, e.g. ``x86_64-avx2``."""
    machine = platform.machine()
    try:
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return machine
    best = next((name for name in ("avx512f", "avx2", "avx") if name in flags), None)
    return f"{machine}-{best}" if best else machine


class OnnxRuntimeBackend(Backend):
    name = "onnxruntime"
    engine_suffix = ".ort.onnx"
    options: ClassVar[Mapping[str, tuple[type, str]]] = {
        "graph-optimisation": (str, f"graph optimisation level: {', '.join(_LEVELS)} (default: all)"),
        "provider": (str, f"on a GPU: {', '.join(_PROVIDERS)} (default: cuda)"),
    }

    def __init__(self) -> None:
        instead = f'"tstitch-trt[{fitting_extra("gpu")}]" for CUDA; never both'
        with silence_output():  # without CUDA's libraries a CUDA build warns here; `_find_cuda` comes to that
            self._ort = require("onnxruntime", "the backend 'onnxruntime'", extra="cpu", instead=instead)

    def version(self) -> str:
        return str(self._ort.__version__)

    def arch(self, device: str) -> str:
        kind, index = parse_device(device)
        if kind == "cpu":
            return cpu_arch()
        from tstitch_engines.device.cuda import compute_capability

        return "sm_{}{}".format(*compute_capability(index))

    def _providers(self, device: str, stream: int | None = None) -> list[Any]:
        kind, index = parse_device(device)
        if kind == "cpu":
            return ["CPUExecutionProvider"]
        self._find_cuda()
        self._require_provider("CUDA", "use --device cpu")
        cuda = {
            "device_id": str(index),
            "use_tf32": "0",  # float32 is float32; by default products have 10 bits of mantissa
            "enable_cuda_graph": "0",  # see the engine
            "do_copy_in_default_stream": "1",
            # What the warm-up took is what a run needs; rounding up to powers of two may double it.
            "arena_extend_strategy": "kSameAsRequested",
        }
        if stream is not None:
            cuda |= {"user_compute_stream": str(stream), "use_ep_level_unified_stream": "1"}
        return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]

    def _require_provider(self, provider: str, way_out: str) -> None:
        there = self._ort.get_available_providers()
        if f"{provider}ExecutionProvider" not in there:
            raise Unavailable(
                f"this ONNX Runtime {self.version()} has no {provider} provider (it has: {', '.join(there)})",
                hint=f'pip uninstall onnxruntime && pip install "tstitch-trt[{fitting_extra("gpu")}]", or {way_out}',
            )

    def _find_cuda(self) -> None:
        """Loads CUDA's libraries from wheels. The CUDA provider looks beside itself only."""
        preload = getattr(self._ort, "preload_dlls", None)
        if preload is None:
            return
        wheels = importlib.util.find_spec("nvidia")
        roots = [Path(root) for root in (wheels.submodule_search_locations or ())] if wheels is not None else []
        folders = sorted(
            (folder for root in roots for folder in root.glob("*/lib")), key=lambda folder: "cudnn" in str(folder)
        )  # cuDNN needs the others
        with silence_output():  # it prints what it misses; whether the provider starts is asked below
            for folder in folders:
                preload(directory=str(folder))
            preload()

    def _session_options(self) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors only; they come back as exceptions as well
        return options

    def compile_here(self, **job: Unpack[CompileJob]) -> tuple[Path, ...]:
        member, model, options = job["member"], job["model"], job["options"]
        device, output = job["device"], job["output"]
        provider = str(options.get("provider", "cuda"))
        if provider not in _PROVIDERS:
            raise unknown_name("provider of ONNX Runtime", provider, _PROVIDERS)
        if "provider" in options and parse_device(device)[0] == "cpu":
            raise BadInput(
                f"provider = {provider}: it runs on a GPU, and the engine is for the CPU",
                hint="add --device cuda, or leave out --option provider",
            )
        # TensorRT reads ONNX's own operators: "extended" puts ONNX Runtime's in their place.
        level = str(options.get("graph-optimisation", "basic" if provider == "tensorrt" else "all"))
        if level not in _LEVELS:
            raise unknown_name("graph optimisation level", level, _LEVELS)
        if provider == "tensorrt":
            self._require_provider("TensorRT", "leave out --option provider")
        providers = self._providers(device)
        settings = self._session_options()
        settings.graph_optimization_level = getattr(self._ort.GraphOptimizationLevel, _LEVELS[level])
        settings.optimized_model_filepath = str(output)
        data = output.with_name(output.name + ".data")
        if len(member.onnx) > 1:
            # Without this the optimised graph would go on referring to the data file of the graph it was made from,
            # which lies elsewhere (and one protobuf file can't hold 2 GiB).
            settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", data.name)
            settings.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        job["progress"]("optimise", 0.0)
        try:
            session = open_session(model, siblings(member.onnx), settings=settings, providers=providers)
        except TStitchError:
            raise
        except Exception as error:
            if any(words in str(error) for words in _NOT_WRITTEN):
                raise BuildFailed(
                    f"ONNX Runtime {self.version()} can't write the engine of {model.name} to {output.parent}: {error}",
                    hint="free space there, or put the cache elsewhere: TSTITCH_TRT_CACHE=DIR",
                ) from error
            raise BuildFailed(
                f"ONNX Runtime {self.version()} can't compile {model.name} ({member.precision}) for {device}: {error}",
                hint="if it names an operator without a kernel for this type, build with --precision fp32 "
                "(the CPU provider has no bfloat16 kernels)",
            ) from error
        self._expect_provider(session, device)
        job["progress"]("optimise", 1.0)
        return (output, data) if data.exists() else (output,)

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
        settings = self._session_options()
        settings.intra_op_num_threads = check_threads(threads) or default_threads()
        settings.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is done already
        stream = getattr(device, "stream_handle", None)
        if stream is not None:
            settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # for `copies_of`
        providers = self._providers(device.name, stream)
        compiled = identity.options.get("provider") == "tensorrt"
        if compiled:
            self._require_provider("TensorRT", "leave out --option provider")
            from tstitch_engines.device.cuda import gpu_and_driver

            gpu, _ = gpu_and_driver(parse_device(device.name)[1])
            settled = tensorrt_options(member, identity, device.name, gpu, stream)
            Path(settled["trt_engine_cache_path"]).mkdir(parents=True, exist_ok=True)
            providers.insert(0, (_TENSORRT, settled))
        try:
            with _alone(device):
                session = open_session(path, beside, settings=settings, providers=providers)
        except TStitchError:
            raise
        except Exception as error:
            raise BadEngine(
                f"ONNX Runtime {self.version()} can't load the engine {path.name}: {error}",
                hint="compile it again: tstitch-trt build BUNDLE --fresh",
            ) from error
        self._expect_provider(session, device.name)
        if compiled and _TENSORRT not in session.get_providers():
            raise Unavailable(
                f"ONNX Runtime could not start its TensorRT provider on {device.name}",
                hint="it needs libnvinfer.so of the TensorRT that it was built for; or build without "
                "--option provider=tensorrt",
            )
        return _OnnxRuntimeEngine(self._ort, session, member, identity, device)

    def _expect_provider(self, session: Any, device: str) -> None:
        """ONNX Runtime falls back to the CPU without an error when CUDA can't start: make it one."""
        if parse_device(device)[0] == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
            raise Unavailable(
                f"ONNX Runtime could not start its CUDA provider on {device}",
                hint="tstitch-trt doctor says which library is missing; or use --device cpu",
            )


def tensorrt_options(
    member: Network, identity: EngineIdentity, device: str, gpu: str, stream: int | None = None
) -> dict[str, str]:
    """The settings of ONNX Runtime's TensorRT provider for an engine: its profile, precision and where it caches.

    Each engine has a folder of its own for each model of ``gpu``: the provider finds what it compiled by names in the
    graph, which fine-tuned members share, and by compute capability, which models share.
    """
    kept = default_root() / "onnxruntime-tensorrt" / digest([identity, gpu])
    found = {
        "device_id": str(parse_device(device)[1]),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(kept),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(kept),
        "trt_fp16_enable": str(int(member.precision == "fp16")),
        "trt_bf16_enable": str(int(member.precision == "bf16")),
    }
    shapes = zip(*(identity.profile.ends(spec) for spec in member.inputs), strict=True)
    for end, sizes in zip(("min", "opt", "max"), shapes, strict=True):
        named = zip(member.inputs, sizes, strict=True)
        found[f"trt_profile_{end}_shapes"] = ",".join(f"{spec.name}:{'x'.join(map(str, size))}" for spec, size in named)
    if stream is not None:
        found |= {"has_user_compute_stream": "1", "user_compute_stream": str(stream)}
    return found


def _alone(device: Device) -> AbstractContextManager[object]:
    """A block in which a session is opened or let go of: that allocates, frees, and compiles (TensorRT provider)."""
    return RECORDING if device.graphs else nullcontext()


def copies_of(session: Any) -> list[str]:
    """The nodes of a loaded graph that copy between host and device; empty where ONNX Runtime is older than 1.24.

    Shapes computed on the CPU make no such node, and don't matter to a recording of fixed shapes.
    """
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    try:
        nodes = [node for part in (ask() if ask is not None else ()) for node in part.get_nodes()]
    except Exception as error:  # its exceptions have no common base; the recording's own checks remain
        _log.info("ONNX Runtime does not tell where its nodes run: %s", error)
        return []
    return [node.name or node.op_type for node in nodes if node.op_type in ("MemcpyFromHost", "MemcpyToHost")]


class _OnnxRuntimeEngine(Engine):
    """On CUDA, one session on our stream. Its own CUDA graphs stay off: it would launch one into our recording, which
    CUDA forbids (error 900; microsoft/onnxruntime pull request 32081).

    A plain run can be recorded when it neither allocates nor waits nor computes on the CPU. Its arena is complete after
    three runs of a size (memory patterns allocate in the second, pull request 15005); the wait at the end is switched
    off below; a graph with copies between host and device is not recorded. The recorder (``device.cuda_graph``) checks
    the rest and falls back to plain runs. Not run on a GPU.
    """

    warmups = 3

    def __init__(self, ort: Any, session: Any, member: Network, identity: EngineIdentity, device: Device) -> None:
        super().__init__(member.inputs, member.outputs, identity.profile)
        have = {item.name for item in (*session.get_inputs(), *session.get_outputs())}
        want = {spec.name for spec in (*member.inputs, *member.outputs)}
        if have != want:
            raise BadEngine(
                f"the engine's tensors {sorted(have)} are not the member's {sorted(want)}",
                hint="compile it again: tstitch-trt build BUNDLE --fresh",
            )
        self._session = session
        self._alone = _alone(device)
        crossings = copies_of(session) if getattr(device, "stream_handle", None) is not None else []
        self._obstacle = ""
        if crossings:
            self._obstacle = f"{len(crossings)} nodes copy between host and device, e.g. {', '.join(crossings[:3])}"
        if identity.options.get("provider") == "tensorrt":
            self._obstacle = "ONNX Runtime's TensorRT provider is a baseline, which runs call by call"
        self._kind, self._index = parse_device(device.name)
        self._binding: Any = None
        self._buffers: dict[str, Buffer] = {}
        self._options = ort.RunOptions()
        self._options.log_severity_level = 3
        # ours is the stream, so ours is the waiting
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    @property
    def obstacle(self) -> str:
        return self._obstacle

    def _bind(self, buffers: Mapping[str, Buffer], batch: int) -> None:
        binding = self._session.io_binding()
        for specs, bind in ((self.inputs, binding.bind_input), (self.outputs, binding.bind_output)):
            for spec in specs:
                buffer = buffers[spec.name]  # by element type: numpy has no bfloat16
                bind(spec.name, self._kind, self._index, ONNX_TYPES[spec.dtype], list(buffer.shape), buffer.ptr)
        self._binding = binding
        self._buffers = dict(buffers)  # the binding holds addresses only

    def enqueue(self) -> None:
        if self._binding is None:
            raise BadInput("the engine has no buffers", hint="call bind(...) before enqueue()")
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise FailedWork(
                f"ONNX Runtime failed while running a member: {error}",
                hint="check the free memory (a smaller batch needs less); --backend torch tells if the model is bad",
            ) from error

    def close(self) -> None:
        with self._alone:
            self._binding = None
            self._session = None
        self._buffers = {}
