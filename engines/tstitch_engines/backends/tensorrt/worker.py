"""Compiles one engine, in a child process: a crash of the library must not end the caller."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tstitch_engines.backends.tensorrt.api import Config, Library, Network, NetworkBuilder, has
from tstitch_engines.backends.tensorrt.attention import Settled, lacks_kernel, settle_attention
from tstitch_engines.backends.tensorrt.flavour import FLAVOURS
from tstitch_engines.backends.tensorrt.inspector import list_layers
from tstitch_engines.backends.tensorrt.library import Session, open_library, session
from tstitch_engines.backends.tensorrt.messages import Done, Request
from tstitch_engines.backends.tensorrt.network import add_profile, parse
from tstitch_engines.backends.tensorrt.options import BuildOptions
from tstitch_engines.backends.tensorrt.timings import read_timings, write_timings
from tstitch_engines.child import Channel
from tstitch_engines.errors import BuildFailed

if TYPE_CHECKING:
    from tstitch_engines.device.cuda import CudaDevice

__all__ = ["compile_engine"]

_log = logging.getLogger(__name__)

_MEGABYTE: Final = 1 << 20


class _Phases:
    """The share done of a tree of phases: a phase's own steps, and of the current step the child at work in it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._open: dict[str, list[int]] = {}  # name -> [steps, done], outer phases first
        self._sent = ("", -1.0)
        self._lock = threading.Lock()

    def start(self, name: str, steps: int) -> None:
        with self._lock:
            self._open[name] = [max(steps, 1), 0]
            self._tell(name)

    def step(self, name: str, step: int) -> None:
        with self._lock:
            if name in self._open:
                self._open[name][1] = step + 1
                self._tell(name)

    def finish(self, name: str) -> None:
        with self._lock:
            self._open.pop(name, None)
            if self._open:
                self._tell(next(reversed(self._open)))

    def _tell(self, name: str) -> None:
        share, width = 0.0, 1.0
        for steps, done in self._open.values():
            share += width * min(done / steps, 1.0)
            width /= steps
        share = min(max(share, self._sent[1], 0.0), 1.0)
        if name != self._sent[0] or share >= self._sent[1] + 0.01:
            self._sent = (name, share)
            self._channel.progress(name.lower(), share)


def _monitor(library: Library, phases: _Phases) -> Any:
    base: Any = library.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        """The builder calls this from threads of its own."""

        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step)
            return True

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def compile_engine(request: Request, channel: Channel) -> Done:
    """Compiles into ``request.output``. Raises ``TStitchError``."""
    try:
        return _compile(request, channel)
    except OSError as error:
        raise BuildFailed(
            f"the engine of {Path(request.model).name} can't be written: {error}",
            hint="free space there, or put the cache elsewhere: TSTITCH_TRT_CACHE=DIR",
        ) from error


def _compile(request: Request, channel: Channel) -> Done:
    flavour = FLAVOURS[request.flavour]
    library = open_library(flavour)
    device = None
    if request.gpu is not None:
        from tstitch_engines.device.cuda import CudaDevice

        device = CudaDevice(request.gpu)  # makes it the current one
    with session(flavour, library) as opened:
        size, attention = _build(opened, request, channel)
        if size is None and request.options.attention == "any" and lacks_kernel(attention, opened.messages.reason()):
            _log.warning(
                "%s: there is no fused kernel for all of its attention (%s); compiled again without requiring one: it "
                "will be slower (--option attention=fused makes this an error)",
                Path(request.model).name,
                attention,
            )
            opened.messages.forget_errors()
            size, attention = _build(opened, request, channel, loose=True)
        if size is None:
            raise _failed(opened, request, attention, device)
        listed = request.options.verbosity == "DETAILED" and list_layers(
            opened,
            Path(request.output),
            on_gpu=request.gpu is not None,
            host_code=request.options.version_compatible,
        )
    return Done(size, str(attention), layers=listed)


def _build(opened: Session, request: Request, channel: Channel, *, loose: bool = False) -> tuple[int | None, Settled]:
    """Writes the engine: its size, ``None`` when the library gave up. ``loose``: no kernel of attention is required."""
    library, model, messages, options = opened.library, Path(request.model), opened.messages, request.options
    builder, network, parser = parse(opened, model, request.family, (request.inputs, request.outputs))
    attention = settle_attention(opened, network, options, loose=loose)
    config = builder.create_builder_config()
    if config is None:
        raise BuildFailed(f"{opened} makes no build configuration: {messages.reason()}", hint="free memory")
    _configure(opened, config, options)
    timings = None if options.timing_cache is None else read_timings(opened, config, Path(options.timing_cache))
    add_profile(opened, builder, config, request.inputs, request.profile)
    config.progress_monitor = _monitor(library, _Phases(channel))
    size = _write(library, builder, network, config, Path(request.output))
    del parser  # held the weights
    if size is not None and messages.inconsistent is not None:
        # It still makes an engine, one that runs at no other size than the first.
        raise BuildFailed(
            f"{model.name} fixes a dimension inside that is dynamic outside: {messages.inconsistent}",
            hint="export the member again with that dimension static, or with its dynamic size kept throughout",
        )
    if size is not None and timings is not None and options.timing_cache is not None:
        write_timings(config, timings, Path(options.timing_cache))
    return size, attention


def _configure(opened: Session, config: Config, options: BuildOptions) -> None:
    library, messages = opened.library, opened.messages
    flags = library.BuilderFlag
    if options.workspace is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, options.workspace * _MEGABYTE)
    if options.optimisation_level is not None:
        config.builder_optimization_level = options.optimisation_level
    if options.tiling is not None:
        config.tiling_optimization_level = getattr(library.TilingOptimizationLevel, options.tiling)
    if options.hardware is not None:
        config.hardware_compatibility_level = getattr(library.HardwareCompatibilityLevel, options.hardware)
    config.max_aux_streams = options.max_aux_streams
    if options.verbosity is not None:
        config.profiling_verbosity = getattr(library.ProfilingVerbosity, options.verbosity)
    if options.version_compatible:
        config.set_flag(flags.VERSION_COMPATIBLE)
    if options.weight_streaming:
        config.set_flag(flags.WEIGHT_STREAMING)
    elif has(library, "BuilderFlag.REQUIRE_USER_ALLOCATION"):
        config.set_flag(flags.REQUIRE_USER_ALLOCATION)  # an engine that can be captured, or an error
    if not options.tf32:
        config.clear_flag(flags.TF32)  # float32 is float32, as with the other backends
    if options.strip_weights:
        config.set_flag(flags.STRIP_PLAN)
    if options.refit:
        config.set_flag(flags.REFIT)
    elif options.strip_weights:
        # For getting back the weights it was made from: nothing is lost in speed, and 11.3's REFIT may lose a bias.
        config.set_flag(flags.REFIT_IDENTICAL)
    if options.capabilities:
        config.num_compute_capabilities = len(options.capabilities)
        for index, number in enumerate(options.capabilities):
            capability = getattr(library.ComputeCapability, f"SM{number}")
            if not config.set_compute_capability(capability, index):
                raise BuildFailed(
                    f"{opened} refuses compute capability {number // 10}.{number % 10}: {messages.reason()}",
                    hint="leave it out of --option compute-capabilities",
                )


def _write(library: Library, builder: NetworkBuilder, network: Network, config: Config, output: Path) -> int | None:
    """Builds into the file ``output``: its size, or ``None`` when the library gave up. Raises ``OSError``."""
    with output.open("wb") as file:
        if not (has(library, "Builder.build_serialized_network_to_stream") and has(library, "IStreamWriter")):
            plan = builder.build_serialized_network(network, config)
            if plan is None:
                return None
            file.write(memoryview(plan))
            return file.tell()
        base: Any = library.IStreamWriter
        trouble: list[OSError] = []

        class Writer(base):  # type: ignore[misc]
            def __init__(self) -> None:
                base.__init__(self)

            def write(self, data: bytes) -> int:
                """Bytes written; fewer than given make the builder stop."""
                try:
                    return file.write(data)
                except OSError as error:
                    trouble.append(error)
                    return 0

        writer = Writer()
        made = builder.build_serialized_network_to_stream(network, config, writer)
        if trouble:
            raise trouble[0]
        return file.tell() if made else None


def _failed(opened: Session, request: Request, attention: Settled, device: CudaDevice | None) -> BuildFailed:
    reason = opened.messages.reason()
    if device is not None and opened.messages.of_memory():  # the library says how much it asked for
        reason += f" ({device.name} has {device.free_memory() / 2**20:.1f} MiB free)"
    if lacks_kernel(attention, reason):
        hint = "leave out --option attention=fused: what has no fused kernel is then taken apart"
    elif "workspace" in reason.lower() and request.options.workspace is not None:
        hint = f"raise --option workspace={request.options.workspace}, or leave it out"
    elif "SM75" in reason or "sm75" in reason:
        hint = "leave 7.5 out of --option compute-capabilities: Turing takes fp16 only"
    elif "memory" in reason.lower():
        hint = "use smaller sizes, --batch MIN:OPT:MAX, or a machine with more memory"
    else:
        hint = (
            "tstitch-trt build --traceback with this message helps to report it; --backend onnxruntime builds as well"
        )
    kind = f"{request.precision}, attention: {attention}" if any(attention) else request.precision
    return BuildFailed(f"{opened} can't compile {Path(request.model).name} ({kind}): {reason}", hint=hint)
