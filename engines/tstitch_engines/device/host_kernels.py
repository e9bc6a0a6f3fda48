"""The step kernels on the CPU: the Python face of ``_kernels``, built from ``engines/src``.

The arithmetic is documented in ``step_row``. Results do not depend on the number of threads, and a lane's result does
not depend on the other lanes of its batch. Different instruction sets may differ in the last bits.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines import _kernels
from tstitch_engines.device.base import ArenaBuffers, Buffer
from tstitch_engines.device.host_memory import HostBuffer
from tstitch_engines.device.step_row import INITIAL_NOISE_STEP, ROW_FIELDS
from tstitch_engines.errors import BadInput

__all__ = ["ISAS", "HostStepKernels", "fill_initial_noise", "gather_rows", "normal"]

ISAS: Final = _kernels.ISAS  # instruction sets this CPU can run, best first

_SEED_MASK = 2**64 - 1
_HINT = "give prepare and advance host buffers of the shapes and dtypes that StepKernels documents"


class HostStepKernels:
    """``StepKernels`` over buffers in host memory, which it keeps alive; each call is finished when it returns.

    An arena is used by one thread at a time. ``threads`` 0 means all cores; small batches always stay on the calling
    thread. ``isa`` is one of ``ISAS`` (by default the best). Raises ``BadInput`` for arrays that do not fit together.
    """

    def __init__(
        self, arena: ArenaBuffers, shape: tuple[int, ...] | None = None, *, threads: int = 0, isa: str | None = None
    ) -> None:
        try:
            arrays = {name: _array(buffer) for name, buffer in arena.items()}
            self._arena = _kernels.Arena(**arrays, spatial=_spatial(arena, shape), threads=threads, isa=isa)
        except (TypeError, ValueError) as error:
            raise BadInput(
                f"these arrays are no arena of lanes: {error}",
                hint="allocate them as ArenaBuffers documents: float32 latents [L,C,...], history [3,L,C,...], "
                f"rows [L,N,{len(ROW_FIELDS)}], int32 step [L], int64 seed [L], int32 fault [L], float32 y, image and "
                "noise as latents, mask [L,1,...], all C-contiguous",
            ) from error

    def prepare(self, active: Buffer, sample: Buffer, timestep: Buffer, *, guided: bool) -> None:
        """See ``StepKernels``. Raises ``BadInput`` for wrong shapes or a lane that has no step left."""
        try:
            self._arena.prepare(_array(active), _array(sample), _array(timestep), guided)
        except (TypeError, ValueError) as error:
            raise BadInput(f"prepare: {error}", hint=_HINT) from error

    def advance(self, active: Buffer, model_output: Buffer, *, guided: bool, rescale: bool) -> None:
        """See ``StepKernels``. Raises ``BadInput`` for wrong shapes, a lane that has no step left, or a row that uses
        memory which was not given."""
        try:
            self._arena.advance(_array(active), _array(model_output), guided, rescale)
        except (TypeError, ValueError) as error:
            raise BadInput(f"advance: {error}", hint=_HINT) from error


def _spatial(arena: ArenaBuffers, shape: tuple[int, ...] | None) -> int:
    """Elements of a channel of latents ``shape``, 0 for those that the arena was made for. Raises ``ValueError``."""
    if shape is None:
        return 0
    channels = arena.latents.shape[1:2]
    if shape[:1] != channels or 0 in shape:
        raise ValueError(f"latents {list(shape)} must have {channels[0]} channels and no side of 0")
    return math.prod(shape[1:])


def gather_rows(active: Buffer, source: Buffer, target: Buffer) -> None:
    """See ``Device.gather_rows``. Raises ``BadInput`` for shapes that do not fit together or a slot outside."""
    try:
        _kernels.gather_rows(_array(active), _array(source), _array(target))
    except (TypeError, ValueError) as error:
        raise BadInput(f"gather_rows: {error}", hint="see Device.gather_rows for the shapes") from error


def _array(buffer: Buffer) -> NDArray[Any]:
    if type(buffer) is HostBuffer:
        return buffer.array
    raise TypeError(f"a {type(buffer).__name__} is not in host memory")


def fill_initial_noise(latent: NDArray[np.float32], seed: int, scale: float) -> None:
    """Writes ``scale * z`` into one lane's C-contiguous latent; ``z`` is keyed by ``seed`` at the initial step."""
    _kernels.normals(latent, seed & _SEED_MASK, INITIAL_NOISE_STEP, scale)


def normal(seed: int, step: int, n: int, *, isa: str | None = None) -> NDArray[np.float32]:
    """The standard normals of elements ``0..n-1`` of a lane at ``step``, as ``advance`` draws them."""
    z = np.empty(n, np.float32)
    _kernels.normals(z, seed & _SEED_MASK, step, isa=isa)
    return z
