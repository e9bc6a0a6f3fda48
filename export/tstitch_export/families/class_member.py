"""What the class-conditional families share: their tensors, example inputs and the reading of published weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tstitch_engines.bundle.manifest import Precision
from tstitch_engines.errors import BadCheckpoint
from tstitch_engines.spec import TensorSpec
from tstitch_export.families.base import TORCH_NAMES, Family, Inspection

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ClassMember", "fill"]


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

    def example(
        self, inspection: Inspection, *, batch: int, seed: int, sizes: Mapping[str, int] | None = None
    ) -> tuple[Tensor, ...]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        channels, height, width = inspection.latent
        given = sizes or {}
        return (
            torch.randn(batch, channels, given.get("H", height), given.get("W", width), generator=generator),
            torch.rand(batch, generator=generator) * 999,
            torch.randint(0, inspection.labels, (batch,), generator=generator),
        )

    def _latent(self, inspection: Inspection) -> tuple[int, int | str, int | str]:
        dims = self.dims(inspection)
        channels, height, width = inspection.latent
        return channels, "H" if "H" in dims else height, "W" if "W" in dims else width


def fill(model: nn.Module, stored: Mapping[str, Tensor], name: str) -> nn.Module:
    """Gives ``model`` the tensors of the file called ``name``, in float32 and eval mode.

    The shapes are those that ``inspect`` accepted. Raises ``BadCheckpoint`` for a value that is not finite.
    """
    import torch

    if bad := next((key for key, tensor in stored.items() if not torch.isfinite(tensor).all()), None):
        raise BadCheckpoint(f"{name}: {bad} holds NaN or infinity", hint="take a checkpoint from before that")
    model.load_state_dict({key: tensor.float() for key, tensor in stored.items()}, assign=True)
    return model.eval().requires_grad_(False)
