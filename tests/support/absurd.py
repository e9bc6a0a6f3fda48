"""Absurd values for every argument. Each is made anew: iterators end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import count, repeat
from pathlib import Path
from typing import Any, Final

import numpy as np

__all__ = ["ABSURD", "Hostile"]


class Hostile:
    """Whatever is asked of it raises."""

    def __raise(self, *_: Any) -> Any:
        raise ZeroDivisionError

    __len__ = __iter__ = __index__ = __int__ = __float__ = __repr__ = __str__ = __array__ = __raise
    __bool__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __fspath__ = __getitem__ = __contains__ = __raise
    __hash__ = None  # type: ignore[assignment]  # neither can it be a key

    @property
    def __dlpack__(self) -> Any:
        raise ZeroDivisionError

    @property
    def shape(self) -> Any:
        raise ZeroDivisionError

    dtype = shape


class Lying(int):
    """A whole number that says that it lies between any two others."""

    def __le__(self, _: object) -> bool:
        return True

    __lt__ = __ge__ = __gt__ = __le__

    def __int__(self) -> int:
        return 1


class LyingText(str):
    """A text that says that it is short."""

    __slots__ = ()

    def __len__(self) -> int:
        return 1


def _raising() -> Iterator[int]:
    yield 1
    raise KeyError("in the middle")


def _tensors() -> dict[str, Callable[[], object]]:
    try:
        import torch
    except ImportError:
        return {}
    return {
        "0-d tensor": lambda: torch.tensor(3),
        "bool tensor": lambda: torch.tensor(True),
        "tensor": lambda: torch.tensor([1, 2]),
        "tensor with gradient": lambda: torch.tensor([1.5], requires_grad=True),
        "bfloat16 tensor": lambda: torch.tensor(1.5, dtype=torch.bfloat16),
        "meta tensor": lambda: torch.empty((1, 4, 8, 8), device="meta"),
    }


_deep: list[Any] = []
for _ in range(100_000):
    _deep = [_deep]

ABSURD: Final[dict[str, Callable[[], object]]] = {
    f"{number} {type(value).__name__}": lambda value=value: value
    for number, value in enumerate((
        None, True, False, "a", b"a", "", [], {}, (), 1.5, -1, 0, 1, 2, 10**8, 10**30, 2**63, 2**64, 10**5000,
        float("nan"), float("inf"), -float("inf"), 1e300, 1e39, 5e-324, -0.0, 1j, "nan", "1", "0-99999999", "\ud800",
        "a\0b", "²", ["a", 1], [1, None], [[1], [2, 3]], {"a": 1}, {1: 2}, {1, 2}, range(3), range(10**12), (1, 2, 3),
        Fraction(1, 2), object(), ..., repr, Path("x"), bytearray(b"a"), ValueError("x"), [True], [0.5, float("nan")],
    ))
} | {
    "long text": lambda: "x" * 1_000_000,
    "long labels": lambda: ",".join(["0-99999"] * 10_000),
    "long schedule": lambda: ",".join(["plain:1"] * 12_000),
    "long list": lambda: [0] * 1_000_000,
    "deep list": lambda: _deep,
    "endless": lambda: count(),
    "endless text": lambda: repeat("a"),
    "raising": _raising,
    "generator": lambda: (number for number in (1, 2)),
    "texts": lambda: iter(["a", "b"]),
    "hostile": Hostile,
    "hostile list": lambda: [Hostile()],
    "lying": lambda: Lying(10**9),
    "lying text": lambda: LyingText("x" * 1_000_000),
    "np.int8": lambda: np.int8(3),
    "np.uint64": lambda: np.uint64(2**64 - 1),
    "np.float16": lambda: np.float16(0.5),
    "np.float16 nan": lambda: np.float16("nan"),
    "np.longdouble": lambda: np.longdouble("1e4000"),
    "np.str_": lambda: np.str_("a"),
    "np.bool_": lambda: np.bool_(True),
    "NaT": lambda: np.datetime64("NaT"),
    "0-d": lambda: np.array(2),
    "0-d object": lambda: np.array(None),
    "one element": lambda: np.array([2]),
    "empty": lambda: np.zeros((0,)),
    "matrix": lambda: np.zeros((2, 2)),
    "masked": lambda: np.ma.masked,
    "texts array": lambda: np.array(["a", "b"]),
    "picture": lambda: np.zeros((8, 8, 3), np.uint8),
    "latents": lambda: np.zeros((1, 4, 8, 8), np.float32),
    "nan latents": lambda: np.full((1, 4, 8, 8), np.nan, np.float32),
    "endless latents": lambda: np.broadcast_to(np.float32(0), (10**8, 4, 8, 8)),
    "endless pictures": lambda: np.broadcast_to(np.uint8(0), (10**4, 2**14, 2**14, 3)),
    "endless mask": lambda: np.broadcast_to(np.float64(0), (2**20, 2**20)),
    "structured": lambda: np.zeros(2, [("a", "f4")]),
    **_tensors(),
}  # fmt: skip
