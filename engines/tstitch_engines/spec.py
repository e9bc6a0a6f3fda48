"""Shapes and types as data: what the exporter promises, the engine checks and the runtime allocates."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
import numpy as np
from numpy.typing import DTypeLike

from tstitch_engines.checks import check_whole, shown
from tstitch_engines.errors import BadInput, OutOfProfile, unknown_name

# How a dimension's range is given to `tstitch-trt build`; heights and widths are given in pixels there.
_FLAGS = {"B": "--batch", "T": "--tokens"}

__all__ = [
    "DTYPES",
    "ONNX_TYPES",
    "Range",
    "ShapeProfile",
    "TensorSpec",
    "itemsize",
    "parse_dimension",
    "storage_dtype",
    "usual_batch",
]

# Field names as ONNX and safetensors users know them -> (bytes per element, the numpy type that stores it).
# numpy has no bfloat16: its bits travel in uint16.
DTYPES: dict[str, tuple[int, DTypeLike]] = {
    "float32": (4, np.float32),
    "float16": (2, np.float16),
    "bfloat16": (2, np.uint16),
    "int64": (8, np.int64),
    "int32": (4, np.int32),
    "uint8": (1, np.uint8),
    "bool": (1, np.bool_),
}
# Name -> element type of onnx.TensorProto
ONNX_TYPES = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}


def itemsize(dtype: str) -> int:
    return DTYPES[dtype][0]


def storage_dtype(dtype: str) -> np.dtype[np.generic]:
    """The numpy type whose memory holds ``dtype`` (``bfloat16`` is kept as its 16 bits)."""
    return np.dtype(DTYPES[dtype][1])


_LARGEST: Final = 1 << 24  # of a dimension
_USUAL_IMAGES: Final = 8
Size = Annotated[int, msgspec.Meta(ge=1, le=_LARGEST)]
Dimension = Annotated[str, msgspec.Meta(max_length=64)]


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes one dynamic dimension may take; ``opt`` is the one the engine is tuned for."""

    min: Size
    opt: Size
    max: Size

    def __post_init__(self) -> None:
        for name in ("min", "opt", "max"):
            check_whole(getattr(self, name), f"{name.upper()} of a profile MIN:OPT:MAX", 0, 1 << 62)
        if not 1 <= self.min <= self.opt <= self.max:
            raise BadInput(
                f"profile {self.min}:{self.opt}:{self.max} is not ordered; allowed is 1 <= MIN <= OPT <= MAX",
                hint="write it as MIN:OPT:MAX, e.g. --batch 1:8:16",
            )
        if self.max > _LARGEST:
            raise BadInput(
                f"profile {self.min}:{self.opt}:{self.max} ends above {_LARGEST}, the largest size of a dimension",
                hint="write it as MIN:OPT:MAX, e.g. --batch 1:8:16",
            )

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    @staticmethod
    def parse(text: str, *, option: str = "--batch") -> Range:
        """``"8"`` is fixed, ``"1:16"`` is tuned for its maximum, ``"1:8:16"`` says all three."""
        parts = text.split(":")
        example = "1:8:16" if option == "--batch" else "512:512:1024"
        if len(parts) > 3 or not all(p.isascii() and p.isdecimal() and len(p) <= 10 for p in parts):
            raise BadInput(
                f"profile {shown(text)} is not MIN:OPT:MAX with whole numbers",
                hint=f"write it as e.g. {option} {example}",
            )
        numbers = [int(p) for p in parts]
        return Range(numbers[0], numbers[-1] if len(numbers) < 3 else numbers[1], numbers[-1])


def usual_batch(*, guided: bool) -> Range:
    """The batch range of an engine where none is given: up to 16 rows, tuned for 8 images.

    ``guided``: an image usually has two rows, one for each half of guidance.
    """
    return Range(1, _USUAL_IMAGES * (2 if guided else 1), 2 * _USUAL_IMAGES)


class ShapeProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The allowed sizes of every named dynamic dimension of a member, e.g. ``{"B": 1:8:16}``."""

    dims: Annotated[dict[Dimension, Range], msgspec.Meta(max_length=32)]

    def ends(self, spec: TensorSpec) -> list[tuple[int, ...]]:
        """The smallest, the usual and the largest shape of a tensor."""
        return [
            spec.resolve({name: getattr(sizes, end) for name, sizes in self.dims.items()})
            for end in ("min", "opt", "max")
        ]

    def check(self, sizes: Mapping[str, int], *, what: str) -> None:
        """Raises ``OutOfProfile`` when a size lies outside its range."""
        for name, size in sizes.items():
            allowed = self.dims.get(name)
            if allowed is None:
                raise unknown_name("dimension", name, self.dims)
            if not allowed.min <= size <= allowed.max:
                raise OutOfProfile(
                    f"{what}: {name} = {size} is outside the profile; allowed is {allowed.min} to {allowed.max}",
                    hint=f"ask for {allowed.min} to {allowed.max}, or build again with a wider profile, e.g. "
                    f"{_FLAGS.get(name, name)} {min(size, allowed.min)}:{allowed.opt}:{max(size, allowed.max)}",
                )


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One input or output: ``shape`` mixes fixed sizes and names of dynamic dimensions (``("B", 4, 32, 32)``).

    A dimension may be a multiple of a named one, ``"8*H"``, or a part of it, ``"H/8"`` (rounded up).
    """

    name: Annotated[str, msgspec.Meta(pattern=r"\A[\w.:/-]{1,500}\Z")]
    dtype: str
    shape: Annotated[tuple[Size | Dimension, ...], msgspec.Meta(max_length=8)]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        for size in self.shape:
            if isinstance(size, str) and not _DIMENSION.fullmatch(size):
                raise BadInput(
                    f"tensor {self.name!r} has the dimension {size!r}; "
                    "allowed are a size, NAME, FACTOR*NAME and NAME/PART",
                    hint='e.g. "H", "8*H" or "H/8"',
                )

    @property
    def dims(self) -> frozenset[str]:
        """The names its shape depends on."""
        return frozenset(name for d in self.shape if isinstance(d, str) for name in (parse_dimension(d)[1],))

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every dynamic dimension replaced by its size."""
        return tuple(d if isinstance(d, int) else _size(d, sizes) for d in self.shape)

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        return math.prod(self.resolve(sizes)) * itemsize(self.dtype)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"


# FACTOR*NAME or NAME/PART; the name is letters, because digits alone are no name to ONNX tools
_DIMENSION = re.compile(r"(?:([1-9][0-9]{0,5})\*)?([A-Za-z]+)(?:/([1-9][0-9]{0,5}))?")


def parse_dimension(text: str) -> tuple[int, str, int]:
    """``"8*H"`` -> ``(8, "H", 1)``, ``"H/8"`` -> ``(1, "H", 8)``."""
    match = _DIMENSION.fullmatch(text)
    assert match is not None, "checked when the spec was made"
    return int(match[1] or 1), match[2], int(match[3] or 1)


def _size(text: str, sizes: Mapping[str, int]) -> int:
    factor, name, part = parse_dimension(text)
    return -(-factor * sizes[name] // part)
