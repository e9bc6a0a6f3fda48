"""Types of stored numbers: what each is called, how its bytes are read, and which of them weights may have. No torch.

The 8-bit floats are those of arXiv 2209.05433: ``float8_e4m3fn`` has no infinity, ``float8_e5m2`` is the upper half of
a float16. Every number of either is one of float16 and of bfloat16.
"""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadCheckpoint

__all__ = ["BITS", "TYPES", "check_weight_type", "from_bytes", "is_eight_bit_float"]

# safetensors' name -> torch's
TYPES: Final = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F6_E2M3": "float6_e2m3", "F6_E3M2": "float6_e3m2", "F4": "float4_e2m1fn_x2", "C64": "complex64", "BOOL": "bool",
    **{f"{sign}{n}": f"{kind}{n}" for sign, kind in (("I", "int"), ("U", "uint")) for n in (8, 16, 32, 64)},
}  # fmt: skip
BITS: Final = {name: {"BF16": 16, "BOOL": 8, "F4": 4}.get(name) or int(re.findall(r"\d+", name)[0]) for name in TYPES}
_NUMPY: Final = {
    "float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "bool": "?",
    "float8_e4m3fn": "u1", "float8_e5m2": "u1",
    **{f"{kind}{8 * n}": f"<{letter}{n}" for letter, kind in (("i", "int"), ("u", "uint")) for n in (1, 2, 4, 8)},
}  # fmt: skip
_WEIGHTS: Final = re.compile(r"float(16|32|64|8_e4m3.*|8_e5m2.*)|bfloat16")
_WEIGHT: Final = re.compile(r"\.(weight|bias)(\.|$)")
_QUANTISED: Final = ("int", "uint", "qint", "quint", "float4", "float6", "float8", "bits")


def is_eight_bit_float(dtype: str) -> bool:
    return dtype.startswith(("float8_e4m3", "float8_e5m2"))


def check_weight_type(file: str, name: str, dtype: str) -> None:
    """Raises ``BadCheckpoint`` for a weight or bias of a type that holds no floats which stand for themselves."""
    if not _WEIGHT.search(name) or _WEIGHTS.fullmatch(dtype):
        return
    quantised = dtype.startswith(_QUANTISED)
    raise BadCheckpoint(
        f"{file}: {name[:200]!r} is stored as {dtype}{', so it is quantised' if quantised else ''}; allowed are "
        "float16, bfloat16, float32, float64, float8_e4m3fn and float8_e5m2",
        hint="give the weights in float16, bfloat16 or float32"
        + ("; tstitch-trt quantise makes 8-bit members of a bundle" if quantised else ""),
    )


def from_bytes(content: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> NDArray[np.floating[Any]] | None:
    """The numbers of a tensor's bytes in float32 (float64 stays); ``None`` for a type that NumPy can't read."""
    if dtype not in _NUMPY:
        return None
    bits: NDArray[Any] = content.view(_NUMPY[dtype]).reshape(shape)
    match dtype:
        case "float64":
            return bits
        case "bfloat16":  # the upper half of a float32
            return (bits.astype(np.uint32) << 16).view(np.float32)
        case "float8_e5m2":
            return (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
        case "float8_e4m3fn":
            return np.asarray(_E4M3[bits])
    return bits.astype(np.float32)


def _e4m3() -> NDArray[np.float32]:
    """The value of each of the 256 bytes: a sign, an exponent of 4 bits and 3 bits after the point."""
    sign, exponent, rest = (np.arange(256) >> 7), (np.arange(256) >> 3) & 15, np.arange(256) & 7
    values = np.where(exponent == 0, rest / 8 * 2.0**-6, (1 + rest / 8) * 2.0 ** (exponent - 7.0))
    values[(exponent == 15) & (rest == 7)] = np.nan
    return (np.where(sign == 1, -1.0, 1.0) * values).astype(np.float32)


_E4M3: Final = _e4m3()
