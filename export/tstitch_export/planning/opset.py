"""The ONNX opset that networks are exported with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tstitch_engines.bundle.manifest import Precision
from tstitch_engines.errors import BadInput
from tstitch_export.families.base import Scalar
from tstitch_export.families.options import typed

__all__ = ["OPSET", "Opsets"]

# Up to opset 22 attention is spelt out as MatMul and Softmax, which every engine builder takes. From 23 on it is one
# node: in half precision TensorRT compiles it to a fused kernel or fails, so that a model can't lose it unnoticed; for
# float32 it has none. (bfloat16 needs 22 in any case: before, Conv is not defined for it.)
OPSET: Final[dict[Precision, int]] = {"fp32": 20, "fp16": 23, "bf16": 23}
_ALLOWED: Final = (20, 23)
_BFLOAT16: Final = 22
_OPTION: Final = {"opset": (int, f"{_ALLOWED[0]} to {_ALLOWED[1]}")}


@dataclass(frozen=True, kw_only=True)
class Opsets:
    """``asked``: the option ``opset``, ``None`` where nothing was said.

    ``oldest`` (in half precision) and ``newest``: what the backend takes, ``why``.
    """

    asked: int | None = None
    oldest: int = _ALLOWED[0]
    newest: int = _ALLOWED[1]
    why: str = ""

    @staticmethod
    def asked_of(options: dict[str, Scalar]) -> int | None:
        """Takes the option out of ``options``. Raises ``BadInput``."""
        found = typed({"opset": options.pop("opset")}, _OPTION, what="the export") if "opset" in options else {}
        asked = found.get("opset")
        if asked is not None and not _ALLOWED[0] <= int(asked) <= _ALLOWED[1]:
            raise BadInput(
                f"option opset is {asked}; allowed is a whole number from {_ALLOWED[0]} to {_ALLOWED[1]}",
                hint=f"leave it out: {_described(OPSET)}",
            )
        return None if asked is None else int(asked)

    def of(self, precision: Precision) -> int:
        """Raises ``BadInput`` where what was asked for can't be had in this precision or with the backend."""
        if self.asked is None:
            return min(OPSET[precision], self.newest)
        nearest = min(self.asked if precision == "fp32" else max(self.asked, self.oldest), self.newest)
        if nearest != self.asked:
            raise BadInput(
                f"option opset is {self.asked}, but {self.why}", hint=f"leave it out, or --option opset={nearest}"
            )
        if precision == "bf16" and self.asked < _BFLOAT16:
            raise BadInput(
                f"option opset is {self.asked}, and a network in bf16 needs {_BFLOAT16}: before, Conv has no bfloat16",
                hint=f"--option opset={_BFLOAT16}, or leave it out",
            )
        return self.asked

    def notes(self, lowered: Sequence[str]) -> tuple[str, ...]:
        """What a bundle says of networks that are exported with an older opset than is usual, though nobody asked."""
        if self.asked is not None or not lowered:
            return ()
        return (f"{', '.join(lowered)}: exported with ONNX opset {self.newest}: {self.why}",)


def _described(opsets: Mapping[Precision, int]) -> str:
    return ", ".join(f"{opset} for {precision}" for precision, opset in opsets.items())
