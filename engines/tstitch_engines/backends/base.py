"""What a backend is: it compiles a member's ONNX into an engine file and loads such files to run them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from glob import escape
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NotRequired, TypedDict, Unpack

import msgspec
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import EngineIdentity, Network, Option, siblings
from tstitch_engines.bundle.onnx_files import NotOnnx, check_onnx
from tstitch_engines.child import DEFAULT, Channel, Job, Limits, run_in_child
from tstitch_engines.device.recording import RECORDING
from tstitch_engines.errors import BadInput, BuildFailed, unknown_name
from tstitch_engines.progress import Progress
from tstitch_engines.spec import ShapeProfile, TensorSpec

if TYPE_CHECKING:
    from tstitch_engines.device.base import Buffer, Device

__all__ = ["BUILD_SECONDS", "Backend", "CompileJob", "CompileRequest", "Engine", "compile_request"]

BUILD_SECONDS: Final = 7200.0  # the limit of one compilation unless another is given: TensorRT times kernels for long


class Engine(ABC):
    """One loaded engine, for one thread at a time. ``enqueue`` neither allocates, copies nor waits.

    On a device with graphs, ``enqueue`` may be recorded (``Device.capture``) and replayed after other buffers were
    bound: an engine keeps what its ``enqueue`` uses (TensorRT: an execution context) for each set of buffers. The
    caller binds few sets, and compares a replay with a plain ``enqueue`` on other data before it trusts it.
    """

    warmups: int = 1
    """How often ``enqueue`` runs on newly bound buffers before it has set up all it needs and can be recorded."""

    keeps_uploads: bool = False
    """Whether host memory that a recorded ``enqueue`` copies from stays as it is until its buffers are released."""

    refit_names: Literal["initialiser", "parameter"] | None = None
    """What ``refit`` calls weights: initialisers of the ONNX graph, or parameters of the exported program.

    ``None``: its weights can't be replaced, ``refit_obstacle`` says why and what would help.
    """

    refit_obstacle: tuple[str, str] = (
        "its backend can't replace the weights of a loaded engine",
        "build with the LoRA fused: tstitch-trt build ... --lora NAME=FILE; or build for --backend torch",
    )

    refit_keeps_recordings: bool = False
    """Whether a recorded ``enqueue`` uses the new weights: they go where the old ones were."""

    jit_ms: float = 0.0
    """Milliseconds spent so far on compiling for this machine: in ``bind``, and in the first ``enqueue`` after it."""

    def __init__(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], profile: ShapeProfile) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.profile = profile
        self.sizes: Mapping[str, int] = {}

    def bind(self, buffers: Mapping[str, Buffer], *, batch: int, sizes: Mapping[str, int] | None = None) -> None:
        """Uses these buffers from the next ``enqueue`` on; each must have the exact shape for ``batch``.

        ``sizes`` are those of the other dynamic dimensions (``H``, ``W``, ``T``); one that the profile fixes may be
        left out. Raises ``OutOfProfile`` for sizes the engine was not built for, ``BadInput`` for a wrong shape or
        dtype.
        """
        fixed = {name: allowed.min for name, allowed in self.profile.dims.items() if allowed.min == allowed.max}
        self.sizes = {**fixed, **{k: v for k, v in (sizes or {}).items() if k in self.profile.dims}, "B": batch}
        self.profile.check(self.sizes, what="engine")
        missing = sorted(set(self.profile.dims) - set(self.sizes))
        if missing:
            raise BadInput(
                f"the engine has dynamic dimensions {missing} whose sizes are not given",
                hint="pass them: bind(buffers, batch=B, sizes={'H': 64, 'W': 64})",
            )
        for spec in (*self.inputs, *self.outputs):
            buffer = buffers.get(spec.name)
            want = spec.resolve(self.sizes)
            if buffer is None or buffer.shape != want or buffer.dtype != spec.dtype:
                got = "nothing" if buffer is None else f"{buffer.dtype}{list(buffer.shape)}"
                raise BadInput(
                    f"engine tensor {spec.name!r} needs {spec.dtype}{list(want)}, got {got}",
                    hint="allocate buffers from the engine's own specs: spec.resolve(sizes), spec.dtype",
                )
        self._bind(buffers, batch)

    @property
    def obstacle(self) -> str:
        """What keeps ``enqueue`` on the bound buffers from being recorded; empty where it can be.

        E.g. that it waits, or works on other streams than the device's. Ask after the warm-ups: it may be other then.
        """
        return ""

    @abstractmethod
    def _bind(self, buffers: Mapping[str, Buffer], batch: int) -> None:
        """Takes checked buffers; ``self.sizes`` has the size of every dynamic dimension, ``B`` included."""

    def release(self, buffers: Mapping[str, Buffer], *, sizes: Mapping[str, int]) -> None:
        """Frees what was set up for these buffers at ``sizes`` (with ``B``). Another ``bind`` sets it up anew.

        The device must have finished, and nothing recorded with them may run again.
        """
        return

    @abstractmethod
    def enqueue(self) -> None:
        """Runs the engine once on the bound buffers in the device's stream order. Raises ``FailedWork``."""

    def refit(self, weights: Mapping[str, NDArray[Any]], others: Mapping[str, NDArray[Any]]) -> None:
        """Replaces weights. Waits for the device before and after; bound buffers stay bound.

        ``weights``: values by name (``refit_names``), in the engine's shape and type (bfloat16 as its bits).
        ``others``: the present values of all others, some of which an engine may want again. Both may compute a value
        on demand. Raises ``BadInput`` where ``refit_names`` is ``None``, and ``BadEngine`` or ``FailedWork`` when the
        engine refuses; its weights are then unknown until a later call succeeds.
        """
        if self.refit_names is None:
            raise BadInput(self.refit_obstacle[0], hint=self.refit_obstacle[1])
        with RECORDING:
            self._refit(weights, others)

    def _refit(self, weights: Mapping[str, NDArray[Any]], others: Mapping[str, NDArray[Any]]) -> None:
        """Of engines that have ``refit_names``."""
        raise NotImplementedError

    def scratch(self) -> Mapping[int, int]:
        """Device memory for activations, address -> bytes; shared blocks have one address.

        Empty where the library allocates on its own.
        """
        return {}

    @abstractmethod
    def close(self) -> None: ...


class CompileJob(TypedDict):
    """The keywords of ``Backend.compile``. ``model``: of the kind ``model_kind``. ``output``: the file to write.

    Of the files beside ``model`` it reads those alone that are listed with it in ``member.onnx``. ``limits``: of the
    child process that does the work. ``note(topic, text)`` is called with what an engine's record is to say of it.
    """

    member: Network
    model: Path
    profile: ShapeProfile
    device: str
    options: Mapping[str, Option]
    output: Path
    progress: Progress
    limits: NotRequired[Limits]
    note: NotRequired[Callable[[str, str], object]]


class CompileRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A ``CompileJob`` on its way to the child, with the backend's class as ``module:name``."""

    backend: str
    member: Network
    model: str
    profile: ShapeProfile
    device: str
    options: dict[str, Option]
    output: str


def compile_request(request: CompileRequest, channel: Channel) -> tuple[str, ...]:
    """Compiles in the child; the files that were written."""
    module, _, name = request.backend.partition(":")
    backend: Backend = getattr(import_module(module), name)()
    written = backend.compile_here(
        member=request.member,
        model=Path(request.model),
        profile=request.profile,
        device=request.device,
        options=request.options,
        output=Path(request.output),
        progress=channel.progress,
    )
    return tuple(map(str, written))


class Backend(ABC):
    """Compiles and loads. Stateless; constructing one imports its library or raises ``Unavailable``."""

    name: str
    model_kind: Literal["onnx", "exported-program"] = "onnx"  # what `compile` wants to be given
    engine_suffix: str = ".engine"
    options: ClassVar[Mapping[str, tuple[type, str]]] = {}  # what `compile` understands: name -> (type, one-line help)
    runs_code: ClassVar[str] = ""  # how loading one of its engines may run code that is in it; empty: it can't
    unrecorded: ClassVar[frozenset[str]] = frozenset()  # options that do not change what is compiled, only the work

    @abstractmethod
    def version(self) -> str:
        """Version of the library that compiles and runs, part of an engine's identity."""

    @abstractmethod
    def arch(self, device: str) -> str:
        """What an engine that runs on ``device`` is tied to: ``x86_64-avx2``, ``sm_90``..."""

    def build_arch(self, device: str, options: Mapping[str, Option]) -> str:
        """What an engine compiled for ``device`` with these options will be tied to. Raises what ``arch`` does."""
        return self.arch(device)

    def build_gpu(self, device: str, options: Mapping[str, Option]) -> str | msgspec.UnsetType:
        """The GPU model that an engine compiled for ``device`` with these options will be tied to, where it is to one.

        The architecture alone does not tell: H100 and H200 are both ``sm_90``.
        """
        return msgspec.UNSET

    def driver(self, device: str) -> str | msgspec.UnsetType:
        """The driver of ``device``, where engines may depend on the one that they were compiled with."""
        return msgspec.UNSET

    def options_for(self, options: Mapping[str, Option], device: str) -> dict[str, Option]:
        """The ``options`` that an engine was compiled with, as one needs them that is to run on ``device``."""
        return dict(options)

    def refused(self, identity: EngineIdentity, device: str) -> Mapping[str, str]:
        """Options of ``tstitch_trt.load`` (``threads``, ``graph``) that an engine can't honour, with the reason."""
        return {} if device == "cpu" else {"threads": f"its engine runs on {device}, not on the CPU's threads"}

    def opset_limits(self, options: Mapping[str, Option]) -> tuple[int, int, str]:
        """The oldest ONNX opset in half precision and the newest that it compiles with these options, and why.

        Of those that are exported.
        """
        return 20, 23, ""

    def doubt(self, identity: EngineIdentity) -> str:
        """What to try where such an engine computes wrongly, in words; empty where nothing is known."""
        return ""

    def check_file(self, path: Path, device: str) -> None:
        """Raises ``BadEngine`` for a file that can't run on ``device``, as far as that is told without loading it."""
        return

    def current_identity(self, identity: EngineIdentity, device: str) -> EngineIdentity:
        """``identity`` as made by this version for ``device``; equal when the engine may run.

        A backend whose engines run on other versions or GPUs keeps those fields.
        """
        return msgspec.structs.replace(identity, backend_version=self.version(), arch=self.arch(device))

    def compile(self, **job: Unpack[CompileJob]) -> tuple[Path, ...]:
        """Compiles ``model`` into ``output``; returns all files it wrote.

        The first is ``output``; any other lies in the same directory and has a name that starts with ``output``'s.
        The work is done in a child process, since a graph may be made to run or grow without end. Raises
        ``UnknownName`` for an option that does not exist, ``BadInput`` for one it can't honour, ``Unsafe`` for a graph
        that reads other files, ``BuildFailed``, and ``OutOfTime`` and ``OutOfMemory`` at the limits of the child;
        nothing it wrote is left then.
        """
        for name in job["options"]:
            if name not in self.options:
                raise unknown_name(f"{self.name} option", name, self.options)
        output = job["output"]
        if self.model_kind == "onnx":
            try:
                check_onnx(job["model"], siblings(job["member"].onnx))
            except NotOnnx as error:
                raise BuildFailed(str(error), hint="build the bundle again from its recipe") from None
        try:
            return self._compile(job)
        except BaseException:
            for path in (output, *output.parent.glob(f"{escape(output.name)}.*")):
                path.unlink(missing_ok=True)
            raise

    def _compile(self, job: CompileJob) -> tuple[Path, ...]:
        """Has ``compile_here`` called in the child; ``compile`` removes what is written when this raises."""
        member, model = job["member"], job["model"]
        request = CompileRequest(
            backend=f"{type(self).__module__}:{type(self).__qualname__}",
            member=Network(**{name: getattr(member, name) for name in Network.__struct_fields__}),
            model=str(model.absolute()),
            profile=job["profile"],
            device=job["device"],
            options=dict(job["options"]),
            output=str(job["output"].absolute()),
        )
        on_cpu = job["device"] == "cpu"
        work = Job(
            what=f"the process compiling {model.name} with {self.name}",
            seconds=BUILD_SECONDS,
            limits=job.get("limits", DEFAULT),
            error=BuildFailed,
            if_killed="free memory, or build on a machine with more and copy the bundle",
            kept=on_cpu,  # a GPU's memory is given back
            host_only=on_cpu,
        )
        return tuple(map(Path, run_in_child(compile_request, request, work, progress=job["progress"])))

    def compile_here(self, **job: Unpack[CompileJob]) -> tuple[Path, ...]:
        """Does the work of ``compile`` in this process, which is the child."""
        raise NotImplementedError

    @abstractmethod
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
        """Loads a file made by ``compile``; ``threads`` 0 means ``default_threads()``.

        ``beside``: names of the files in its folder that belong to it. Raises ``BadEngine`` for a damaged file,
        ``Unsafe`` for one that would read others.
        """
