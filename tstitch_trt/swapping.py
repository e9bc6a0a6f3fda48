"""The verbs of a runtime that change what its engines compute with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Self

from tstitch_trt.lora import LoraFiles, Loras

__all__ = ["LoraSwapping"]


class LoraSwapping(ABC):
    """Between requests only: while one runs, every verb raises ``BadInput``."""

    _loras: Loras

    @abstractmethod
    def _alone(self) -> AbstractContextManager[None]:
        """Keeps everybody else out, or raises ``BadInput``."""

    @property
    def loras(self) -> dict[str, str]:
        """Those that ``swap_lora`` put in, by network: ``{"large": "style.safetensors:0.8"}``."""
        return self._loras.said()

    def swap_lora(self, name: str, files: LoraFiles) -> None:
        """Puts LoRAs into a member or text encoder, in place of those that an earlier call put there.

        ``files``: ``"style.safetensors:0.8,lcm.safetensors"``, a path, or a list of paths and ``(path, weight)``. For
        engines that can be refitted: of the backend ``torch``, and of TensorRT built with ``--option refit=true``.
        Raises ``BadCheckpoint`` for a LoRA for another model and ``BadInput`` where engines can't; whatever it raises,
        the network has the weights that it had before.
        """
        with self._alone():
            self._loras.swap(name, files)

    def restore(self, name: str | None = None) -> None:
        """Takes out what ``swap_lora`` put into a network, or into any: the bundle's own weights, bit for bit."""
        with self._alone():
            self._loras.restore(name)

    @contextmanager
    def lora(self, name: str, files: LoraFiles) -> Iterator[Self]:
        """``swap_lora`` for the time of a ``with`` block; afterwards what was there before is back."""
        before = self._loras.current(name)
        self.swap_lora(name, files)
        try:
            yield self
        finally:
            with self._alone():
                self._loras.put(name, before)
