"""From a bundle on disk to a runtime."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from tstitch_engines.backends import Engine, open_backend
from tstitch_engines.bundle.bundle import Bundle, check_bundle, open_bundle, require_vouched
from tstitch_engines.bundle.manifest import ComponentName
from tstitch_engines.checks import (
    check_callable,
    check_choice,
    check_path,
    check_switch,
    check_text,
    checked,
    optional,
    taken_as_is,
)
from tstitch_engines.child import Limits, parse_size
from tstitch_engines.closing import do_all
from tstitch_engines.compile.load import load_engine, require_trust
from tstitch_engines.compile.select import check_load_options, default_backend, select_engine
from tstitch_engines.compile.select import rebuild as rebuild_engines
from tstitch_engines.device.open import device_kept, open_device
from tstitch_engines.errors import Unavailable, first_line
from tstitch_engines.threads import check_threads, default_threads
from tstitch_engines.trace import span, use_nvtx
from tstitch_trt.runtime.chooser import ChooserFactory
from tstitch_trt.runtime.memory import check_memory
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.runtime.step_graphs import GRAPH_MODES, GraphMode
from tstitch_trt.runtime.work_queue import EXIT, check_timeout

if TYPE_CHECKING:
    from tstitch_engines.progress import Progress

__all__ = ["load"]

_log = logging.getLogger(__name__)


@checked(
    bundle=check_bundle,
    device=partial(check_text, example="cpu", most=100),
    backend=optional(partial(check_text, example="onnxruntime", most=100)),
    threads=optional(check_threads),
    verify=partial(check_choice, allowed=("full", "size")),
    graph=partial(check_choice, allowed=GRAPH_MODES),
    stream=taken_as_is,
    rebuild=check_switch,
    trust=check_switch,
    require_signature=optional(check_path),
    overlap=check_switch,
    progress=optional(check_callable),
    chooser=optional(check_callable),
    timeout=check_timeout,
    time_limit=taken_as_is,
    memory_limit=taken_as_is,
    max_memory=taken_as_is,
)
def load(
    bundle: str | Path | Bundle,
    *,
    device: str = "cpu",
    backend: str | None = None,
    threads: int | None = None,
    verify: Literal["full", "size"] = "full",
    graph: GraphMode = "auto",
    stream: Any = None,
    rebuild: bool = False,
    trust: bool = False,
    require_signature: str | Path | None = None,
    overlap: bool = True,
    progress: Progress | None = None,
    chooser: ChooserFactory | None = None,
    timeout: float | None = None,
    time_limit: float | str | None = None,
    memory_limit: int | str | None = None,
    max_memory: int | str | None = None,
) -> Runtime:
    """Loads all members and parts of a bundle and returns the runtime that samples from them.

    ``device``: ``cpu``, ``cuda`` or ``cuda:N`` (CUDA: not run on a GPU). ``backend``: one the bundle has engines of;
    by default the first it was built for. ``threads``: CPU threads of the engines, at most four for each core (or 64);
    0 (the default) for ``$OMP_NUM_THREADS`` or else all cores; only where they run on the CPU. ``verify``: ``full``
    checks every file's sha256, ``size`` only sizes.

    ``graph`` (CUDA): ``step`` records each kind of step once and replays it, ``segment`` replays all equal steps in a
    row with one launch, ``off`` runs call by call; ``auto`` is ``step`` where the device has graphs and ``off`` where
    it has none. ``stream`` (CUDA): a stream to work on, an object with ``__cuda_stream__`` or an integer handle, not a
    default stream; its owner keeps it alive. ``sample`` returns when its work is done either way.

    ``overlap`` (CUDA): the VAE's decoder, and the encoders of texts and pictures, each work on a stream and in
    activation memory of their own, so that pictures are made, and with a server prompts are read, while the steps of
    other images run. Without it there is one block of memory for all, and one order.

    ``rebuild``: engines that are missing, damaged or don't fit this machine and these versions are compiled again from
    the bundle's own ONNX with the options and profile they had, and the bundle is replaced in one step. ``progress``
    then gets the phase and the share done. ``time_limit`` and ``memory_limit``: of the child process that compiles one,
    as of ``tstitch_export.build.build``.

    ``trust``: engines that may run code when they are loaded (TensorRT's plans, PyTorch's programs) may be loaded from
    this bundle. Without it they load where ``backend`` names theirs, this machine compiled them, or a signature was
    required. ``require_signature``: the file of a public key (Ed25519, PEM) with which the bundle must be signed; it is
    checked before anything is read, and before ``rebuild``, which leaves the new bundle unsigned.

    ``max_memory``: bytes, or ``8GiB``, that weights, buffers of all lanes, and inputs and outputs of all engines at
    their largest batch and size may come to. Without it what is taken at once must be free: weights and lanes, on a GPU
    inputs and outputs too. Activations are the libraries' own and in neither.

    Engines run in this process, for speed, and a step can't be interrupted: one from a stranger may run for ever or
    take any memory for activations. ``verify`` tries it in a child process first; a server has limits of its own.

    ``chooser``: makes what chooses schedules for ``latency_budget_ms``; by default of ``tstitch_trt.load`` the one that
    reads the bundle's calibration and studies (``tstitch_trt.study.budget``).

    ``timeout``: seconds that a call waits for those before it, ``None`` for ever; then it raises ``Busy``.

    Raises ``BadBundle`` for a damaged bundle, ``BadEngine`` for engines that don't fit this machine (naming each
    field that differs and the command that rebuilds them), ``BadInput`` for an option that these engines or this
    device can't honour, ``Unavailable`` for a missing library or device, ``OutOfMemory`` before anything is loaded,
    ``Untrusted`` for engines that nobody vouches for, ``Unsafe`` for files that hold pickled objects or read files that
    the bundle does not list.
    """
    limits = Limits.of(time_limit, memory_limit)
    most = None if max_memory is None else parse_size(max_memory, "max_memory", "--max-memory 8GiB")
    use_nvtx()
    started = perf_counter()
    if isinstance(bundle, Bundle):
        opened = require_vouched(bundle, require_signature)
    else:
        with span("open bundle", verify=verify):
            opened = open_bundle(Path(bundle), verify=verify, engines=not rebuild, require_signature=require_signature)
    with device_kept(device):
        place = open_device(device, stream=stream)
        if graph in ("step", "segment") and not place.graphs:
            raise Unavailable(
                f"graph = {graph}: the device {place.name} has no graphs; allowed there are auto and off",
                hint="leave out --graph (graph=...), or use --device cuda",
            )
        used = threads or (default_threads() if place.name == "cpu" else 0)
        name = backend or default_backend(opened)
        library = open_backend(name)
        trusted = trust or backend is not None
        if rebuild:
            every = opened.manifest.networks()
            opened = rebuild_engines(
                opened,
                library,
                place.name,
                names=every,
                trusted=trusted,
                verify=verify,
                progress=progress,
                limits=limits,
            )
        networks = opened.manifest.networks()
        options = {"threads": threads, "graph": graph if graph in ("step", "segment") else None}
        chosen = {network: select_engine(opened, network, library, place.name) for network in networks}
        for network, record in chosen.items():
            require_trust(opened, network, record, library, trusted=trusted)
            check_load_options(opened, network, record, library, place.name, options)
        check_memory(opened.manifest, chosen, place, most)
        stepped = {*opened.manifest.members, ComponentName.CONTROLNET}
        decoding = place.with_own_stream() if overlap and ComponentName.VAE_DECODER in chosen else place
        encoders = set(chosen) - stepped - {ComponentName.VAE_DECODER}
        encoding = place.with_own_stream() if overlap and encoders else place
        places = {ComponentName.VAE_DECODER: decoding, **dict.fromkeys(encoders, encoding)}
        engines: dict[str, Engine] = {}
        entered = object()
        try:
            EXIT.enter(entered)
            for network, record in chosen.items():
                where = places.get(network, place)
                with span("load engine", network=network, backend=name):
                    engines[network] = load_engine(
                        opened, network, record, library, where, threads=used, trusted=trusted
                    )
            load_ms = 1e3 * (perf_counter() - started)
            return Runtime(
                *(opened, place, name, engines, load_ms),
                graph=graph,
                places=places,
                threads=used,
                chooser=chooser,
                timeout=timeout,
            )
        except BaseException:
            try:
                do_all(*(engine.close for engine in engines.values()))
            except Exception as error:  # why nothing was loaded is what matters
                _log.warning("%s: closing its engines: %s", opened.manifest.name, first_line(error))
            raise
        finally:
            EXIT.inside.pop(entered, None)
