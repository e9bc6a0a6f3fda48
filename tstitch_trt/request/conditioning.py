"""What a request says about the picture, as data: for every network one value per image of each conditioning input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest, Network
from tstitch_engines.errors import BadInput

__all__ = [
    "Conditioning",
    "Values",
    "class_values",
    "conditioning_inputs",
    "guidance_embedding",
    "is_residual",
]

Array = NDArray[Any]
_STEP_INPUTS = ("sample", "timestep")  # the step kernels write these


def is_residual(name: str) -> bool:
    """Whether an input is what a ControlNet gives a member."""
    return name.startswith("down_residual_") or name == "mid_residual"


def conditioning_inputs(network: Network) -> tuple[str, ...]:
    """The inputs that a request fills."""
    return tuple(s.name for s in network.inputs if s.name not in _STEP_INPUTS and not is_residual(s.name))


@dataclass(frozen=True)
class Values:
    """One input: image i has row ``i % len`` of ``conditional [U,...]``, and of ``unconditional`` in the other half.

    ``unconditional`` ``None``: both halves have the same.
    """

    conditional: Array
    unconditional: Array | None = None

    def row(self, image: int) -> tuple[Array, Array]:
        """What the conditional and the unconditional half of an image are given."""
        other = self.conditional if self.unconditional is None else self.unconditional
        return np.asarray(self.conditional[image % len(self.conditional)]), np.asarray(other[image % len(other)])


@dataclass(frozen=True)
class Conditioning:
    """``networks``: members, and the ControlNet where one runs, with all that ``conditioning_inputs`` names."""

    networks: Mapping[str, Mapping[str, Values]]

    def tokens(self, name: str) -> int:
        """``T`` of a network, 0 for one without text."""
        values = self.networks.get(name, {}).get("encoder_hidden_states")
        return 0 if values is None else int(values.conditional.shape[1])

    def check(self, manifest: Manifest) -> None:
        """Every input of every network is there. Raises ``BadInput`` naming one that is not."""
        for name, values in self.networks.items():
            for key in conditioning_inputs(manifest.networks()[name]):
                if key not in values:
                    raise BadInput(
                        f"network {name!r} has an input {key!r}, and nothing in the request gives it",
                        hint=f"inputs that requests fill here: {', '.join(values) or 'none'}; look at the bundle with "
                        "tstitch-trt inspect",
                    )


def class_values(manifest: Manifest, labels: Sequence[int]) -> Values:
    """The ``labels`` of all images, and the null class in the unconditional half, if there is one."""
    null = manifest.conditioning.null
    conditional = np.array(labels, np.int64)
    return Values(conditional, None if null is None else np.array([null], np.int64))


def guidance_embedding(scale: float, width: int) -> NDArray[np.float32]:
    """``timestep_cond`` ``[1, width]`` of a distilled member (arXiv 2310.04378, section 4.2): sines, then cosines.

    Of ``1000 (scale - 1)`` at ``width / 2`` frequencies from 1 down to 1/10000, as diffusers' LCM pipelines embed it.
    """
    half = width // 2
    frequencies = np.exp(-np.log(10000.0) * np.arange(half) / (half - 1))
    angles = 1000.0 * (scale - 1) * frequencies
    found = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2)])
    return found.astype(np.float32)[None]
