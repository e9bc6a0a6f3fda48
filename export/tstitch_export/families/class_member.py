"""What the class-conditional families share: their tensors, example inputs and the reading of published weights."""

from __future__ import annotations

from tstitch_engines.bundle.manifest import Precision
from tstitch_engines.spec import TensorSpec
from tstitch_export.families.base import TORCH_NAMES, Family, Inspection

__all__ = ["ClassMember"]


class ClassMember(Family):
    """sample ``[B,C,H,W]``, timestep ``[B]`` float32, labels ``[B]`` int64 -> model_output ``[B,C or 2C,H,W]``."""

    def inputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec(name="sample", dtype=TORCH_NAMES[precision], shape=("B", *self._latent(inspection))),
            TensorSpec(name="timestep", dtype="float32", shape=("B",)),
            TensorSpec(name="labels", dtype="int64", shape=("B",)),
        )

    def outputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        channels, height, width = self._latent(inspection)
        shape = ("B", channels * (2 if inspection.learned_variance else 1), height, width)
        return (TensorSpec(name="model_output", dtype=TORCH_NAMES[precision], shape=shape),)

    def _latent(self, inspection: Inspection) -> tuple[int, int | str, int | str]:
        dims = self.dims(inspection)
        channels, height, width = inspection.latent
        return channels, "H" if "H" in dims else height, "W" if "W" in dims else width
