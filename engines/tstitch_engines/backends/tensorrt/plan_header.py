"""The header of a TensorRT-RTX plan: its version and the GPUs it is for, read without the library.

The format is not documented; what is read here was observed on the plans of 1.5 to 1.7, and nothing is concluded from
a header that looks otherwise. 64 bytes, little-endian:

    0   "vtrt"                 16  u64 size of the whole plan in bytes     28  "vtrt"
    8   u32 format, 2          24  version, four bytes (1, 7, 1, 116)      32  u32 mask of compute capabilities
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["HEADER_BYTES", "PlanHeader", "parse_plan_header", "read_plan_header"]

HEADER_BYTES: Final = 64
_MAGIC: Final = b"vtrt"
_FORMAT: Final = 2
_CAPABILITIES: Final = {0: (7, 5), 1: (8, 0), 2: (8, 6), 3: (8, 9), 4: (12, 0), 5: (12, 1)}  # bit of the mask
_LATER: Final = 6  # "later than 12.x", in plans for the default list


class PlanHeader(NamedTuple):
    """``size``: bytes that the whole plan has. ``later``: it is also for GPUs newer than those it names."""

    version: str
    size: int
    capabilities: tuple[tuple[int, int], ...]
    later: bool

    def runs_on(self, capability: tuple[int, int]) -> bool:
        newest = max(self.capabilities, default=(0, 0))
        return capability in self.capabilities or (self.later and capability > newest)

    def gpus(self) -> str:
        """E.g. ``8.6, 8.9, 12.0 and later``."""
        names = ", ".join(f"{major}.{minor}" for major, minor in self.capabilities)
        return f"{names} and later" if self.later else names


def parse_plan_header(head: bytes) -> PlanHeader | None:
    """``None`` when these are not the first bytes of a TensorRT-RTX plan of a format that is known."""
    if len(head) < HEADER_BYTES or head[:4] != _MAGIC or head[28:32] != _MAGIC:
        return None
    (form,), (size,), (mask,) = (struct.unpack_from(kind, head, at) for kind, at in (("<I", 8), ("<Q", 16), ("<I", 32)))
    known = sum(1 << bit for bit in (*_CAPABILITIES, _LATER))
    if form != _FORMAT or mask == 0 or mask & ~known or size < HEADER_BYTES:
        return None
    found = tuple(capability for bit, capability in _CAPABILITIES.items() if mask >> bit & 1)
    return PlanHeader(".".join(str(part) for part in head[24:28]), size, found, bool(mask >> _LATER & 1))


def read_plan_header(path: Path) -> PlanHeader | None:
    """Of the file at ``path``; raises ``OSError`` when it can't be read."""
    with path.open("rb") as stream:
        return parse_plan_header(stream.read(HEADER_BYTES))
