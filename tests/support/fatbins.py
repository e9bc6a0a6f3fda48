"""CUDA fat binaries without content: which images they say that they have."""

from __future__ import annotations

import struct

__all__ = ["MACHINE_CODE", "PTX", "pack_images"]

PTX, MACHINE_CODE = 1, 2


def pack_images(*images: tuple[int, tuple[int, int], int]) -> bytes:
    """``images``: kind, version (of the PTX ISA, for PTX) and architecture, as 90."""
    body = b"".join(
        struct.pack("<HHIQIIHHI32x", kind, 257, 64, 8, 0, 0, minor, major, arch) + bytes(8)
        for kind, (major, minor), arch in images
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body
