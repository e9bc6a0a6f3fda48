"""Where memory lives and work runs: the few verbs the runtime needs, on the host and on CUDA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, Protocol

from numpy.typing import NDArray

from tstitch_engines.errors import FailedWork

__all__ = [
    "ALIGNMENT",
    "ArenaBuffers",
    "Buffer",
    "Device",
    "Download",
    "Graph",
    "NotCaptured",
    "StepKernels",
    "Stopwatch",
]

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


@dataclass(frozen=True)
class ArenaBuffers:
    """Device memory of ``L`` lanes of latents ``[C,...]`` with tables of up to ``N`` rows.

    A smaller latent lies C-contiguous at the start of its slot. ``seed`` holds the bits of a uint64; ``fault`` is
    -1, or the first step after which the lane's latent was not finite. The optional buffers may be left out where no
    row uses them: ``y``, the second state, and those of inpainting: the ``image`` latents, the ``mask`` (1 = drawn,
    0 = kept), and unit ``noise``.
    """

    latents: Buffer  # float32 [L,C,...]
    history: Buffer  # float32 [3,L,C,...]
    rows: Buffer  # float32 [L,N,25]
    step: Buffer  # int32 [L]
    seed: Buffer  # int64 [L]
    fault: Buffer  # int32 [L]
    y: Buffer | None = None  # float32 [L,C,...]
    image: Buffer | None = None  # float32 [L,C,...]
    mask: Buffer | None = None  # float32 [L,1,...]
    noise: Buffer | None = None  # float32 [L,C,...]

    def items(self) -> list[tuple[str, Buffer]]:
        """The buffers that are there, by name."""
        every = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, buffer) for name, buffer in every if buffer is not None]


class StepKernels(Protocol):
    """``prepare`` and ``advance`` over the lanes of one arena (see ``step_row`` for the arithmetic).

    Neither synchronises or allocates. ``active`` int32 ``[B]`` holds the slots of the lanes of this batch, each at most
    once. -1 marks a spare position, which fills a batch up: the member is given there what it is given at the first
    position, which is never spare, and ``advance`` changes nothing.
    """

    def prepare(self, active: Buffer, sample: Buffer, timestep: Buffer, *, guided: bool) -> None:
        """Writes ``C_IN x`` into ``sample [B or 2B, C, H, W]`` and ``T`` into ``timestep [B or 2B]``.

        When ``guided`` both halves get the same values: first the conditional lanes, then the unconditional ones.
        """

    def advance(self, active: Buffer, model_output: Buffer, *, guided: bool, rescale: bool) -> None:
        """Applies each lane's current row to ``model_output [B or 2B, C or 2C, H, W]`` and moves on by one step.

        ``active`` is what ``prepare`` was last given: on CUDA it notes the rows that are applied here.
        ``rescale`` says whether any active row has a nonzero ``RESCALE`` (it needs a reduction of its own).
        """


class NotCaptured(FailedWork):
    """Work that can't become a graph. The device is as it was before; the work can still run call by call."""


class Graph(Protocol):
    """Recorded work. It knows addresses only: what it touches must outlive it."""

    def launch(self) -> None:
        """Puts all of it into the device's order of work with one call. Does not wait."""

    def close(self) -> None:
        """Frees the graph, after what it does at the moment."""


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
        """Makes it the calling thread's device: before other calls, on another thread or after another device's."""

    def kept(self) -> AbstractContextManager[None]:
        """A block in which it may be activated, after which the calling thread has the device it had, if it had one."""

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

    def lost(self) -> str | None:
        """Why nothing can run on it any more in this process, ``None`` where something can. Asked after an error."""

    def capture(self, work: Callable[[], None], *, uploads: bool = False) -> Graph:
        """Records what ``work`` enqueues instead of running it. Raises ``NotCaptured`` with the reason.

        Run ``work`` once before (libraries set things up in their first call), and allocate nothing in it. ``uploads``:
        it may copy from ordinary host memory, whose owner keeps it as it is for as long as the graph is launched.
        """

    def step_kernels(self, arena: ArenaBuffers, shape: tuple[int, ...] | None = None) -> StepKernels:
        """The step kernels over the arena's lanes as latents of ``shape`` ``[C,...]``, at most as large as the arena's.

        Cheap, and meant to be made once for each latent size: lanes of several sizes lie side by side in one arena. By
        default lanes have the size that the arena was made for. A row that uses an optional buffer which is not there
        is refused on the host, and a fault on CUDA.
        """

    def gather_rows(self, active: Buffer, source: Buffer, target: Buffer) -> None:
        """Copies the active slots' rows of bytes together: ``target[half * B + i] = source[half, active[i]]``.

        ``source`` uint8 ``[halves, L, pitch]``; ``target`` of any dtype ``[B or halves * B, ...]``, with rows of at
        most ``pitch`` bytes. A spare position (-1) gets what the first position gets.
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
