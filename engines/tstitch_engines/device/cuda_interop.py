"""Arrays and streams of other libraries on CUDA, through the protocols and without importing the libraries.

Not run on a GPU (see ``cuda``). DLPack (https://dmlc.github.io/dlpack), ``__cuda_array_interface__`` version 3
(numba's documentation) and ``__cuda_stream__`` (cuda.core's documentation).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from tstitch_engines.device.base import Buffer
from tstitch_engines.device.cuda_errors import attempt
from tstitch_engines.device.cuda_memory import CudaBuffer
from tstitch_engines.device.cuda_stream import CudaMemory, StreamHandle
from tstitch_engines.errors import BadInput
from tstitch_engines.spec import DTYPES, storage_dtype

__all__ = ["CudaArray", "borrow", "foreign_stream"]

_CPU, _CUDA, _PINNED, _MANAGED = 1, 2, 3, 13  # DLDeviceType
_LEGACY: Final = 1  # cudaStreamLegacy, also DLPack's number for it
_DEFAULT_STREAMS: Final = {0: "the legacy default stream", 1: "the legacy default stream", 2: "a default stream"}


class CudaArray:
    """A buffer for other libraries: ``torch.from_dlpack(array)``, ``cupy.asarray(array)``. It keeps the buffer alive.

    It names no stream: its data is complete when the caller gets it. bfloat16 shows as its 16 bits (``uint16``), which
    ``tensor.view(torch.bfloat16)`` reads.

    Whoever takes it by DLPack says on which stream; memory of ours is used again only after what that stream was given
    to do before it was let go of. The stream must exist until then. ``__cuda_array_interface__`` has no word for the
    reader's stream: such a reader keeps the array until its work is done.
    """

    def __init__(self, buffer: Buffer, device_index: int) -> None:
        self._buffer = buffer
        self._index = device_index
        self.shape = buffer.shape
        self.dtype = buffer.dtype

    def __dlpack__(self, *, stream: int | None = None, **arguments: Any) -> Any:
        """``stream``: of the reader, ``None`` for the legacy default stream, -1 for one that is not to be ordered."""
        from cuda.core import Buffer as Memory
        from cuda.core.utils import StridedMemoryView

        owner: Any = self._buffer
        while isinstance(owner, CudaBuffer):
            owner = owner.owner
        reader = _LEGACY if stream is None else int(stream)
        if isinstance(owner, CudaMemory) and reader != -1 and reader not in owner.readers:
            owner.readers.append(reader)
        memory = Memory.from_handle(self._buffer.ptr, self._buffer.nbytes, owner=self._buffer)
        view = StridedMemoryView.from_buffer(memory, self.shape, dtype=storage_dtype(self.dtype))
        return view.__dlpack__(stream=stream, **arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, self._index

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": storage_dtype(self.dtype).str,
            "data": (self._buffer.ptr, False),
            "version": 3,
            "stream": None,
        }

    def __repr__(self) -> str:
        return f"CudaArray({self.dtype}{list(self.shape)} on cuda:{self._index})"


def borrow(array: Any, *, device_index: int, stream: int) -> CudaBuffer | None:
    """See ``Device.borrow``. The producer's work is ordered before what ``stream`` does from here on."""
    kind = f"a {type(array).__name__}"
    if hasattr(array, "__dlpack_device__"):
        place, index = (int(part) for part in array.__dlpack_device__())
        if place in (_CPU, _PINNED):
            return None
        if place not in (_CUDA, _MANAGED):
            raise BadInput(f"{kind} on DLPack device type {place}; allowed are 1 (host) and 2 (CUDA)", hint=_HOST)
        _same_device(kind, index, device_index)
    elif not hasattr(array, "__cuda_array_interface__"):
        return None

    from cuda.core.utils import StridedMemoryView

    try:
        view = attempt(f"{kind} can't be waited for", StridedMemoryView.from_any_interface, array, stream_ptr=stream)
    except (BufferError, RuntimeError) as error:  # how producers refuse, e.g. torch for a tensor that needs a gradient
        raise BadInput(f"{kind} can't be read where it lies: {error}", hint=_HOST) from error
    _same_device(kind, int(view.device_id), device_index)
    shape = tuple(int(size) for size in view.shape)
    dtype = str(np.dtype(view.dtype))
    if dtype not in DTYPES:
        raise BadInput(f"{kind} of {dtype}; allowed are {', '.join(DTYPES)}", hint="convert it, e.g. tensor.float()")
    if view.strides is not None and not _contiguous(shape, tuple(view.strides)):
        raise BadInput(
            f"{kind} of shape {list(shape)} and strides {list(view.strides)} is not contiguous",
            hint="pass a contiguous one, e.g. tensor.contiguous()",
        )
    return CudaBuffer(view, int(view.ptr), shape, dtype)


_HOST: Final = "pass a detached, dense CUDA array, or a host copy (in torch: tensor.detach().cpu())"


def _same_device(kind: str, index: int, wanted: int) -> None:
    if index != wanted:
        raise BadInput(
            f"{kind} on cuda:{index}; this runtime is on cuda:{wanted}",
            hint=f"move it (in torch: tensor.to('cuda:{wanted}')), or load with device='cuda:{index}'",
        )


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Row by row without gaps; ``strides`` in elements. The stride of a dimension of size 1 says nothing."""
    expected = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return all(size == 1 or have == want for size, have, want in zip(shape, strides, expected, strict=True))


def foreign_stream(stream: Any) -> Any:
    """``stream``, or an integer handle, as an object with ``__cuda_stream__``. Raises ``BadInput`` for what is none."""
    if isinstance(stream, int) and not isinstance(stream, bool):
        wrapped: Any = StreamHandle(stream)
    elif hasattr(stream, "__cuda_stream__"):
        wrapped = stream
    else:
        raise BadInput(
            f"stream={stream!r} is no CUDA stream",
            hint="pass an object with __cuda_stream__, or its integer handle (in torch: stream.cuda_stream)",
        )
    handle = int(wrapped.__cuda_stream__()[1])
    if handle in _DEFAULT_STREAMS:
        raise BadInput(
            f"stream={stream!r} is {_DEFAULT_STREAMS[handle]}, which CUDA can't record graphs on",
            hint="make a stream of its own (in torch: torch.cuda.Stream()) and order your work with events",
        )
    return wrapped
