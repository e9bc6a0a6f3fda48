"""Activation memory: one block per device that every engine on it works in, as large as the largest needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from tstitch_engines.device.base import Buffer, Device

__all__ = ["Scratch", "shared_scratch"]


class Scratch:
    """A block that grows. Engines may share it as long as they run one after another on the device's stream."""

    def __init__(self, device: Device) -> None:
        self._empty = device.empty
        self._block: Buffer | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._block is None else self._block.nbytes

    def reserve(self, nbytes: int) -> None:
        """Makes the block at least this large. Raises ``FailedWork`` when the device has no room.

        A context that was bound before goes on using the old block, which stays while it is held.
        """
        if nbytes > self.nbytes:
            self._block = self._empty((nbytes,), "uint8")

    def block(self) -> Buffer | None:
        """To be held for as long as its address is in use; ``None`` when nothing was reserved."""
        return self._block


_shared: Final[WeakKeyDictionary[Device, Scratch]] = WeakKeyDictionary()


def shared_scratch(device: Device) -> Scratch:
    """The block of ``device``, which goes with it."""
    if device not in _shared:
        _shared[device] = Scratch(device)
    return _shared[device]
