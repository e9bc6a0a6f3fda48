"""A loaded TensorRT engine. Not run on a GPU: tests run it against a synthetic library."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tstitch_engines.backends.base import Engine
from tstitch_engines.backends.tensorrt.api import Context, CudaEngine, Library, RuntimeConfig, has
from tstitch_engines.backends.tensorrt.flavour import Flavour
from tstitch_engines.backends.tensorrt.inspector import of_engine
from tstitch_engines.backends.tensorrt.kernel_cache import KernelCache, cache_path
from tstitch_engines.backends.tensorrt.layers import PlanLayers
from tstitch_engines.backends.tensorrt.library import Messages, Session, logger_of, session
from tstitch_engines.backends.tensorrt.network import DTYPES
from tstitch_engines.backends.tensorrt.options import require_supported
from tstitch_engines.backends.tensorrt.plan import DIAGNOSES, map_plan, rebuild
from tstitch_engines.backends.tensorrt.plan_header import HEADER_BYTES
from tstitch_engines.backends.tensorrt.refit import refit
from tstitch_engines.backends.tensorrt.scratch import Scratch, shared_scratch
from tstitch_engines.device.cuda import gpu_and_driver
from tstitch_engines.device.open import parse_device
from tstitch_engines.device.recording import RECORDING
from tstitch_engines.errors import BadEngine, BadInput, FailedWork

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tstitch_engines.bundle.manifest import EngineIdentity, Network
    from tstitch_engines.device.base import Buffer
    from tstitch_engines.device.cuda import CudaDevice

__all__ = ["TensorRtEngine"]

_log = logging.getLogger(__name__)


@dataclass
class _Ready:
    """A context and what it knows only the addresses of. ``fresh``: it has not run yet."""

    context: Context
    buffers: Mapping[str, Buffer]
    scratch: Buffer | None
    fresh: bool = True


class TensorRtEngine(Engine):
    """One execution context per batch size and set of buffers, so that a recorded ``enqueue`` stays valid for good.

    Contexts work in one block of activation memory per device, shared by all engines there, unless the engine was
    built with the option ``private-scratch``. It is reserved on loading, for the largest sizes of the profile, and
    replaced by a larger one for a context that wants more; a context keeps the block it was made with, and so does
    what was recorded with it.

    ``jit_ms`` (TensorRT-RTX): making a context and its first ``enqueue``, where kernels are compiled that are not in
    the cache. They are saved after that ``enqueue``, for the next process.
    """

    # What it computes of shapes on the host, and initial values of some workspaces, is uploaded from the context's own
    # memory; a recorded enqueue is documented to hold while the context and its shapes and addresses stay.
    keeps_uploads = True

    def __init__(
        self,
        flavour: Flavour,
        library: Library,
        path: Path,
        member: Network,
        identity: EngineIdentity,
        device: CudaDevice,
    ) -> None:
        super().__init__(member.inputs, member.outputs, identity.profile)
        self._flavour = flavour
        self._library = library
        self._name = path.name
        self._device = device
        self._streamed = bool(identity.options.get("weight-streaming", False))
        self._device.activate()
        self._stream = self._device.stream_handle
        with RECORDING, session(flavour, library) as opened:
            self._engine = self._deserialise(path, opened, bool(identity.options.get("version-compatible", False)))
            self._check_tensors()
            if identity.options.get("strip-weights"):
                self._restore_weights(path, member, opened)
            if self._streamed:  # before the first context
                said = len(opened.messages.errors)  # all that a property tells of a refusal
                self._engine.weight_streaming_budget_v2 = self._engine.streamable_weights_size // 2
                if len(opened.messages.errors) > said:
                    raise self._unusable("refuses to stream half of the weights", opened.messages)
            # Neither these settings nor the library's cache of kernels is kept alive by the contexts made from it.
            self._kernels: KernelCache | None = None
            self._how = self._context_settings(identity, opened.messages)
        if identity.options.get("refit"):
            self.refit_names = "initialiser"
        else:
            self.refit_obstacle = (
                f"its engine {path.name} was compiled without the option refit",
                f"{rebuild(flavour)} --option refit=true",
            )
        self._scratch = Scratch(device) if identity.options.get("private-scratch") else shared_scratch(device)
        self._scratch.reserve(self._engine.device_memory_size_v2)
        self._contexts: dict[tuple[object, ...], _Ready] = {}
        self._bound: _Ready | None = None

    # --- loading

    def _deserialise(self, path: Path, opened: Session, host_code: bool) -> CudaEngine:
        plan, messages = map_plan(self._flavour, path), opened.messages
        runtime = self._library.Runtime(opened.logger)
        if host_code:
            runtime.engine_host_code_allowed = True  # a version-compatible plan carries its own runtime
        diagnosis = None
        if has(self._library, "Runtime.get_engine_validity"):
            flags = int(runtime.get_engine_validity(plan[:HEADER_BYTES])[1])
            kinds = self._library.EngineInvalidityDiagnostics
            diagnosis = next((name for name in DIAGNOSES if flags & int(getattr(kinds, name))), None)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None and (diagnosis == "INSUFFICIENT_GPU_MEMORY" or messages.of_memory()):
            room = f"{len(plan) / 2**20:.1f} MiB, of {self._device.free_memory() / 2**20:.1f} MiB free"
            raise FailedWork(
                f"{self._device.name} has no room for the weights of the engine {path.name}: {room} "
                f"({messages.reason()})",
                hint="free memory that other programs hold (nvidia-smi lists them), use a larger GPU, or build again "
                "with --option weight-streaming=true",
            )
        if engine is None and diagnosis == "UNSUPPORTED_CC":
            require_supported(self._flavour, self._library, self._device.name)
        if engine is None:
            what, fix = DIAGNOSES[diagnosis] if diagnosis else ("it refuses it", None)
            raise BadEngine(
                f"{opened} can't load the engine {path.name}: {what} ({messages.reason()})",
                hint=fix or rebuild(self._flavour),
            )
        return engine

    def _check_tensors(self) -> None:
        """The plan must have the member's tensors, types and profile: it was made for this very ONNX."""
        library, engine = self._library, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = {name for name in names if engine.get_tensor_mode(name) == library.TensorIOMode.INPUT}
        wanted = {spec.name: spec for spec in (*self.inputs, *self.outputs)}
        if set(names) != set(wanted) or inputs != {spec.name for spec in self.inputs}:
            raise self._foreign(f"has the tensors {sorted(names)}; wanted are {sorted(wanted)}")
        for name, spec in wanted.items():
            kind = engine.get_tensor_dtype(name)
            if kind != getattr(library.DataType, DTYPES[spec.dtype]):
                raise self._foreign(f"has {name} of type {kind}; wanted is {spec.dtype}")
        for spec in self.inputs:
            ends = [tuple(shape) for shape in engine.get_tensor_profile_shape(spec.name, 0)]
            want = self.profile.ends(spec)
            if ends != want:
                raise self._foreign(f"takes {spec.name} of the sizes {ends}; wanted are {want}")

    def layers(self) -> PlanLayers:
        """What the loaded plan tells of its layers. Raises ``FailedWork`` where it tells nothing that can be read."""
        with session(self._flavour, self._library) as opened:
            try:
                return of_engine(self._engine, self._library, str(opened))
            except ValueError as error:
                raise FailedWork(
                    f"{opened} tells no layers of the engine {self._name}: {error}",
                    hint="compile it again with --profiling-verbosity detailed",
                ) from error

    def _foreign(self, what: str) -> BadEngine:
        return BadEngine(f"the engine {self._name} {what}", hint=rebuild(self._flavour))

    def _restore_weights(self, path: Path, member: Network, opened: Session) -> None:
        """Fills a stripped plan from the ONNX of the bundle that it lies in."""
        onnx = member.onnx[0].path
        model = next((folder / onnx for folder in path.resolve().parents if (folder / onnx).is_file()), None)
        if model is None:
            raise BadEngine(
                f"the engine {path.name} was built without weights, and {onnx} is not beside it",
                hint="load the whole bundle, or build again without --option strip-weights",
            )
        refitter = self._library.Refitter(self._engine, opened.logger)
        restorer = self._library.OnnxParserRefitter(refitter, opened.logger)
        if not restorer.refit_from_file(str(model)) or not refitter.refit_cuda_engine():
            raise BadEngine(
                f"the weights of {model.name} don't go into the engine {path.name}: {opened.messages.reason()}",
                hint=rebuild(self._flavour),
            )

    def _context_settings(self, identity: EngineIdentity, messages: Messages) -> Any:
        """What ``create_execution_context`` is given: activation memory is ours to bring."""
        library = self._library
        ours = library.ExecutionContextAllocationStrategy.USER_MANAGED
        if not has(library, "ICudaEngine.create_runtime_config"):
            return ours
        settings = self._engine.create_runtime_config()
        if settings is None:
            raise self._unusable("makes no runtime configuration", messages)
        settings.set_execution_context_allocation_strategy(ours)
        if has(library, "IRuntimeConfig.set_runtime_cache"):
            self._specialise(settings, identity)
        return settings

    def _specialise(self, settings: RuntimeConfig, identity: EngineIdentity) -> None:
        """TensorRT-RTX: kernels for the shapes of a context before it first runs, and no graphs of its own.

        With its default a recorded step would keep the slow kernels used until the fast ones are compiled.
        """
        library = self._library
        settings.dynamic_shapes_kernel_specialization_strategy = library.DynamicShapesKernelSpecializationStrategy.EAGER
        settings.cuda_graph_strategy = library.CudaGraphStrategy.DISABLED
        cache = settings.create_runtime_cache()
        if cache is None:
            return
        gpu, driver = gpu_and_driver(parse_device(self._device.name)[1])
        path = cache_path(identity, version=library.__version__, gpu=gpu, driver=driver)
        kernels = KernelCache(cache, path)
        if settings.set_runtime_cache(cache):
            self._kernels = kernels
        else:
            _log.warning("%s takes no kernel cache: kernels of %s are compiled again", self._flavour.title, self._name)

    def _unusable(self, what: str, messages: Messages) -> FailedWork:
        free = self._device.free_memory()
        return FailedWork(
            f"{self._flavour.title} {self._library.__version__} {what} for {self._name}: {messages.reason()} "
            f"({self._device.name} has {free / 2**20:.1f} MiB free)",
            hint="check the GPU's free memory (nvidia-smi); a smaller --batch at build needs less",
        )

    # --- running

    def _bind(self, buffers: Mapping[str, Buffer], batch: int) -> None:
        """Allocates and waits the first time these buffers are met."""
        key = self._key(buffers, self.sizes)
        if key not in self._contexts:
            with RECORDING, session(self._flavour, self._library) as opened:
                self._device.synchronize()
                started = perf_counter()
                self._contexts[key] = self._ready(buffers, opened.messages)
                self._compiled_since(started)
        self._bound = self._contexts[key]

    def _compiled_since(self, started: float) -> None:
        if self._flavour.compiles_without_gpu:  # for no GPU in particular, so the rest is done here
            self.jit_ms += 1e3 * (perf_counter() - started)

    @property
    def obstacle(self) -> str:
        if self._streamed:
            return f"{self._name} streams weights (weight-streaming), which allocates while it runs"
        if (
            self._bound is not None
            and has(self._library, "IExecutionContext.is_stream_capturable")
            and not self._bound.context.is_stream_capturable(self._stream)
        ):
            return f"{self._flavour.title} {self._library.__version__} says that {self._name} is not stream-capturable"
        return ""

    def _key(self, buffers: Mapping[str, Buffer], sizes: Mapping[str, int]) -> tuple[object, ...]:
        return (*sorted(sizes.items()), *(buffers[spec.name].ptr for spec in (*self.inputs, *self.outputs)))

    def release(self, buffers: Mapping[str, Buffer], *, sizes: Mapping[str, int]) -> None:
        dims = {name: sizes.get(name, allowed.min) for name, allowed in self.profile.dims.items()}
        with RECORDING:  # freeing waits for the device
            gone = self._contexts.pop(self._key(buffers, dims), None)
            if gone is self._bound:
                self._bound = None
            del gone

    def _ready(self, buffers: Mapping[str, Buffer], messages: Messages) -> _Ready:
        context = self._new_context(messages)
        for spec in (*self.inputs, *self.outputs):
            if not context.set_tensor_address(spec.name, buffers[spec.name].ptr):
                raise self._unusable(f"refuses the address of {spec.name}", messages)
        said = len(messages.errors)
        need = context.update_device_memory_size_for_shapes()
        if need == 0 and len(messages.errors) > said:  # 0 without an error: these sizes need none
            raise self._unusable("can't tell how much scratch memory it needs", messages)
        self._scratch.reserve(need)
        block = self._scratch.block()
        if block is not None:
            context.set_device_memory(block.ptr, block.nbytes)  # returns nothing: a refusal is an error message
            if len(messages.errors) > said:
                raise self._unusable(f"refuses {block.nbytes} bytes of scratch memory", messages)
        return _Ready(context, dict(buffers), block)

    def _new_context(self, messages: Messages) -> Context:
        context = self._engine.create_execution_context(self._how)
        if context is None:
            raise self._unusable("makes no execution context", messages)
        try:
            context.set_optimization_profile_async(0, self._stream)
        except RuntimeError:  # of this call and of `infer_shapes` the bindings raise what others return
            raise self._unusable("refuses its profile", messages) from None
        self._device.synchronize()
        for spec in self.inputs:
            shape = spec.resolve(self.sizes)
            if not context.set_input_shape(spec.name, shape):
                raise self._unusable(f"refuses {spec.name} of shape {list(shape)}", messages)
        try:
            missing = context.infer_shapes()
        except RuntimeError:
            raise self._unusable("can't tell the shapes", messages) from None
        if missing:
            raise self._unusable(f"does not know the shapes of {', '.join(missing)}", messages)
        for spec in self.outputs:
            got = tuple(context.get_tensor_shape(spec.name))
            if got != spec.resolve(self.sizes):
                raise self._foreign(f"gives {spec.name} of shape {list(got)}; wanted is {spec}")
        return context

    def enqueue(self) -> None:
        ready = self._bound
        if ready is None:
            raise BadInput("the engine has no buffers", hint="call bind(...) before enqueue()")
        if ready.fresh:
            self._enqueue_first(ready)
        elif not ready.context.execute_async_v3(self._stream):
            raise self._not_started()

    def _enqueue_first(self, ready: _Ready) -> None:
        with RECORDING:  # what is compiled now allocates and waits
            started = perf_counter()
            if not ready.context.execute_async_v3(self._stream):
                raise self._not_started()
            ready.fresh = False
            self._compiled_since(started)
        if self._kernels is not None:
            self._kernels.save()

    def _not_started(self) -> FailedWork:
        # To listen in `enqueue` would cost every step a lock.
        last = logger_of(self._library)[1].last_error  # maybe of an earlier call
        said = f"{last} (the library's latest error)" if last else "the library gave no reason"
        return FailedWork(
            f"{self._flavour.title} could not start {self._name}: {said}",
            hint="run again with logging.getLogger('tstitch_engines').setLevel('DEBUG') to see all that it says",
        )

    def _refit(self, weights: Mapping[str, NDArray[Any]], others: Mapping[str, NDArray[Any]]) -> None:
        fix = f"{rebuild(self._flavour)} --option refit=true, or with the LoRA fused (--lora NAME=FILE)"
        with session(self._flavour, self._library) as opened:
            self._device.synchronize()
            refit(opened, self._engine, weights, others, what=f"the engine {self._name}", fix=fix)
            self._device.synchronize()

    def scratch(self) -> Mapping[int, int]:
        blocks = [self._scratch.block(), *(ready.scratch for ready in self._contexts.copy().values())]
        return {block.ptr: block.nbytes for block in blocks if block is not None}

    def close(self) -> None:
        """Keeps the compiled kernels (TensorRT-RTX) and lets go of everything. Waits for the device."""
        if not hasattr(self, "_engine"):
            return
        try:
            self._device.synchronize()
            if self._kernels is not None and self._contexts:
                self._kernels.save()
        finally:  # a GPU that is lost must not keep what it held
            with RECORDING:
                self._bound = None
                self._contexts = {}
                self._kernels = self._how = None
                del self._engine
