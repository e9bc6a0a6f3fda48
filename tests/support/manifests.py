"""Manifests made by hand, for what needs no files."""

from __future__ import annotations

from typing import Any

from tstitch_engines.bundle.manifest import Conditioning, Decoder, Defaults, Latent, Manifest, Member, NoiseScheduleSpec
from tstitch_engines.spec import TensorSpec

__all__ = ["manifest", "member"]


def member(*, parametrisation: str = "eps", learned: bool = False, channels: int = 4, size: int = 8) -> Member:
    return Member(
        family="dit",
        parametrisation=parametrisation,  # type: ignore[arg-type]
        precision="fp32",
        learned_variance=learned,
        inputs=(
            TensorSpec(name="sample", dtype="float32", shape=("B", channels, size, size)),
            TensorSpec(name="timestep", dtype="float32", shape=("B",)),
            TensorSpec(name="labels", dtype="int64", shape=("B",)),
        ),
        outputs=(
            TensorSpec(name="model_output", dtype="float32", shape=("B", channels * (2 if learned else 1), size, size)),
        ),
        onnx=(),
        sources=(),
        check=None,
        config={},
    )


def manifest(members: dict[str, Member] | None = None, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "schema": 1,
        "name": "test",
        "recipe": "test",
        "versions": {},
        "latent": Latent(channels=4, height=8, width=8),
        "noise": NoiseScheduleSpec(kind="linear"),
        "conditioning": Conditioning(classes=10, null=10),
        "defaults": Defaults(),
        "decoder": Decoder(kind="pixel"),
        "members": members or {"small": member(), "large": member(parametrisation="v")},
    }
    return Manifest(**(fields | changes))
