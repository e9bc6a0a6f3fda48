"""What PyTorch has once for the whole process on CUDA, and engines of several runtimes and threads share."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakSet

from tstitch_engines.device.recording import RECORDING

if TYPE_CHECKING:
    from tstitch_engines.device.base import Device

__all__ = ["EXACT", "WORKSPACES", "pool_of"]

_EXACT_WORD: Final = "ieee"


class ExactConvolutions:
    """No TF32 (10 bits of mantissa) in float32 convolutions while any thread is inside.

    PyTorch lets them use it unless told otherwise, by one setting for all threads: the first thread in changes it, the
    last one out puts back what was there. A setting that others make meanwhile holds for the next thread in no longer,
    and stays when the last one is out.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: tuple[Any, ...] = ()

    @contextmanager
    def __call__(self, torch: Any) -> Iterator[None]:
        cudnn = torch.backends.cudnn
        with self._lock:
            if not self._inside or not _is_exact(cudnn):
                self._before = _settings(cudnn)
                _set_exact(cudnn)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside and _is_exact(cudnn):
                    _put_back(cudnn, self._before)


def _operators(cudnn: Any) -> tuple[Any, ...]:
    """Those with a precision of their own, from PyTorch 2.9 on; none before. They are changed together: PyTorch refuses
    to say ``allow_tf32``, which TorchInductor reads, while they differ."""
    return (cudnn.conv, cudnn.rnn) if hasattr(cudnn, "conv") else ()


def _allow_tf32(cudnn: Any) -> bool | None:
    """The older switch; ``None`` where it contradicts the newer ones, so that PyTorch refuses to tell it."""
    try:
        return bool(cudnn.allow_tf32)
    except RuntimeError:
        return None


def _is_exact(cudnn: Any) -> bool:
    if operators := _operators(cudnn):
        return all(operator.fp32_precision == _EXACT_WORD for operator in operators)
    return not cudnn.allow_tf32


def _settings(cudnn: Any) -> tuple[Any, ...]:
    """The switch and each operator's precision, which is ``none`` where it is that of all of cuDNN or of everything."""
    shared = getattr(cudnn, "fp32_precision", "none")
    said = [operator.fp32_precision for operator in _operators(cudnn)]
    return (_allow_tf32(cudnn), *("none" if shared == word else word for word in said))


def _set_exact(cudnn: Any) -> None:
    cudnn.allow_tf32 = False
    for operator in _operators(cudnn):
        operator.fp32_precision = _EXACT_WORD


def _put_back(cudnn: Any, before: tuple[Any, ...]) -> None:
    allow, *words = before
    if allow:  # this sets the operators, too
        cudnn.allow_tf32 = True
    for operator, word in zip(_operators(cudnn), words, strict=True):
        operator.fp32_precision = word


class Workspaces:
    """cuBLAS's workspaces, which PyTorch keeps for every stream it ever multiplied on, also in pools that are gone.

    When no engine is left they are freed (PyTorch issue 184084; there is no way to free those of one stream). Not
    while the process holds CUDA graphs of PyTorch, which may have been recorded with the address of one (issue 193402).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines: WeakSet[Any] = WeakSet()

    def hold(self, engine: object) -> None:
        with self._lock:
            self._engines.add(engine)

    def release(self, torch: Any, engine: object) -> None:
        """Frees them if ``engine`` was the last. Its work must be done, and its pool must still be there.

        While no thread records: the recording might break (``RECORDING``).
        """
        with RECORDING, self._lock:
            self._engines.discard(engine)
            clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
            if not self._engines and clear is not None and not _graphs_of(torch):
                clear()


def _graphs_of(torch: Any) -> bool:
    # By type(), not isinstance(): that asks the object itself, and proxies raise.
    return any(issubclass(type(found), torch.cuda.CUDAGraph) for found in gc.get_objects())


EXACT: Final = ExactConvolutions()
WORKSPACES: Final = Workspaces()
_pools: Final[WeakKeyDictionary[Device, Any]] = WeakKeyDictionary()


def pool_of(torch: Any, device: Device, place: Any) -> Any:
    """The memory pool of our device object, which goes with it and the engines that hold it."""
    if device not in _pools:
        with torch.cuda.device(place):
            _pools[device] = torch.cuda.MemPool()
    return _pools[device]
