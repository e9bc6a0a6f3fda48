"""Where memory lives and work runs: the few verbs the runtime needs, on the host and on CUDA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from numpy.typing import NDArray

from tstitch_engines.errors import FailedWork

__all__ = ["ALIGNMENT", "Buffer", "Device", "Download", "Graph", "NotCaptured", "StepKernels", "Stopwatch"]

ALIGNMENT = 256  # bytes: what TensorRT wants of every address it is given, and what CUDA's allocators give


class Buffer(Protocol):
    """Owned, contiguous device memory with a shape; ``ptr`` stays the same for its whole life."""

    @property
    def ptr(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


class StepKernels(Protocol):
    """``prepare`` and ``advance`` over one arena of lanes (see ``rows`` for the arithmetic).

    Neither synchronises or allocates. ``active`` holds the arena slots of the lanes of this batch, int32 ``[B]``.
    """

    def prepare(self, active: Buffer, sample: Buffer, timestep: Buffer, *, guided: bool) -> None:
        """Writes ``C_IN x`` into ``sample [B or 2B, C, H, W]`` and ``T`` into ``timestep [B or 2B]``.

        When ``guided`` both halves get the same values: first the conditional lanes, then the unconditional ones.
        """

    def advance(self, active: Buffer, model_output: Buffer, *, guided: bool, rescale: bool) -> None:
        """Applies each lane's current row to ``model_output [B or 2B, C or 2C, H, W]`` and moves on by one step.

        ``rescale`` says whether any active row has a nonzero ``RESCALE`` (it needs a reduction of its own).
        """


class NotCaptured(FailedWork):
    """Work that can't become a graph. The device is as it was before; the work can still run call by call."""


class Graph(Protocol):
    """Recorded work. It knows addresses only: what it touches must outlive it."""

    def launch(self) -> None:
        """Puts all of it into the device's order of work with one call. Does not wait."""

    def close(self) -> None:
        """Frees the graph; the device must be done with it."""


class Download(Protocol):
    """A copy to the host under way."""

    def get(self) -> NDArray[Any]:
        """The copy; waits for it, and only for it. Call it once."""


class Device(Protocol):
    """One place to run. Methods that wait for the device say so; all others return at once."""

    calls: Counter[str]
    """How often each kind of call went to the device so far: ``alloc``, ``upload``, ``download``, ``copy``, ``sync``,
    ``launch``, ``graph launch``, ``capture``. Differences of it prove what a stretch of code does not do."""

    graphs: bool
    """Whether ``capture`` is there at all."""

    @property
    def name(self) -> str:
        """``cpu`` or ``cuda:N``."""

    def activate(self) -> None:
        """Makes the device usable on the calling thread."""

    def with_own_stream(self) -> Device:
        """The same device for work that runs beside this object's: nothing orders the two but what the host waits for.

        On CUDA another object with a stream of its own, and so with scratch memory of its own for the engines loaded on
        it; on the host, where all work is done in its call, this one.
        """

    def empty(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Allocates, aligned to ``ALIGNMENT``; the contents are undefined."""

    def view(self, block: Buffer, offset: int, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A part of ``block`` as a buffer of its own, from byte ``offset`` on; it keeps the block alive."""

    def upload(self, target: Buffer, source: NDArray[Any]) -> None:
        """Copies host data into a buffer of the same shape. On CUDA the source may be reused at once (staged)."""

    def download(self, source: Buffer) -> NDArray[Any]:
        """A host copy of the buffer. Waits for the device's work on it."""

    def download_later(self, source: Buffer) -> Download:
        """Copies what the buffer holds now; later work may overwrite it at once and runs beside the copy."""

    def copy(self, target: Buffer, source: Buffer) -> None:
        """Copies within the device, in the order of its work. Shape and dtype are equal."""

    def borrow(self, array: Any) -> Buffer | None:
        """Someone else's array in this device's memory as a buffer, without a copy; ``None`` for one in host memory.

        ``array`` has ``__dlpack__`` or ``__cuda_array_interface__``; its producer's pending work is ordered before
        ours. Raises ``BadInput`` for one on another device, or not contiguous, or of a dtype that ``spec`` lacks.
        """

    def share(self, buffer: Buffer) -> Any:
        """The buffer for other libraries, without a copy: an object with ``__dlpack__``.

        A numpy array on the host; on CUDA it also has ``__cuda_array_interface__``. Call ``synchronize`` before
        handing it on: it names no stream.
        """

    def synchronize(self) -> None:
        """Waits until all work enqueued by this device object is done."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records what ``work`` enqueues instead of running it. Raises ``NotCaptured`` with the reason.

        Run ``work`` once before (libraries set things up in their first call), and allocate nothing in it.
        """

    def step_kernels(
        self,
        *,
        latents: Buffer,
        history: Buffer,
        rows: Buffer,
        step: Buffer,
        seed: Buffer,
        fault: Buffer,
        y: Buffer | None = None,
        known: Buffer | None = None,
        mask: Buffer | None = None,
        noise: Buffer | None = None,
    ) -> StepKernels:
        """The step kernels over an arena of ``L`` lanes of ``C*H*W`` elements and tables of ``N`` rows.

        ``latents`` float32 ``[L,C,H,W]``; ``history`` float32 ``[3,L,C,H,W]``; ``rows`` float32 ``[L,N,25]``;
        ``step`` int32 ``[L]``; ``seed`` int64 ``[L]`` (bits of a uint64); ``fault`` int32 ``[L]``: -1, or the step at
        which a lane's latent first was not finite.

        What no row uses may be left out: ``y`` float32 ``[L,C,H,W]``, and for the blend ``known`` and ``noise``
        float32 ``[L,C,H,W]`` and ``mask`` float32 ``[L,1,H,W]`` (1 = drawn, 0 = known). A row that uses what was left
        out is refused on the host, and a fault on CUDA.

        Cheap, and meant to be made several times over the same memory: views (``Device.view``) of other ``C``, ``H``
        and ``W`` at the start of the same blocks, with the same ``L``, give kernels for another latent size. A
        trajectory stays with the kernels it began with.
        """

    def initial_noise(self, latents: Buffer, slot: int, seed: int, scale: float) -> None:
        """Writes ``scale * z`` into one lane's latent, ``z`` from Philox keyed by ``seed`` at the initial step."""

    def scaled_copy(self, target: Buffer, source: Buffer, scale: float) -> None:
        """``target = scale * source``, both float32 of one shape in the device's memory."""

    def stopwatch(self) -> Stopwatch:
        """Marks points of the device's work queue and tells the milliseconds between them."""


class Stopwatch(Protocol):
    def mark(self) -> None:
        """Notes a point in the work queue. Does not wait."""

    def milliseconds(self) -> list[float]:
        """Times between consecutive marks. Waits for the last mark."""
