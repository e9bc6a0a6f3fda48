"""Whether a stream may be recorded at the moment."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tstitch_engines.device.recording import RECORDING

__all__ = ["others_may_record"]


def others_may_record() -> bool:
    """Whether a thread other than the calling one gets the lock ``RECORDING``."""

    def ask() -> bool:
        free = RECORDING.acquire(blocking=False)
        if free:
            RECORDING.release()
        return free

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result()
