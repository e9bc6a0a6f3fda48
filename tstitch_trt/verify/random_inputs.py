"""Random inputs of any network of a bundle, in the ranges that sampling could give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest, Network
from tstitch_trt.runtime.text_encoder import TokenLayout

__all__ = ["random_inputs"]


def random_inputs(
    manifest: Manifest, name: str, sizes: Mapping[str, int], rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """One call's inputs of the network ``name``, float32 or integer. ``sizes``: of all its dimensions, ``B`` included.

    Timesteps and labels are drawn evenly, the null class among them; texts of any length between their begin and end;
    pictures and masks in their ranges; all else is unit Gaussian.
    """
    network, conditioning = manifest.networks()[name], manifest.conditioning
    labels = [*range(conditioning.classes), *([] if conditioning.null is None else [conditioning.null])]
    values: dict[str, NDArray[Any]] = {}
    for spec in network.inputs:
        shape = spec.resolve(sizes)
        if spec.name == "timestep":
            values[spec.name] = (rng.random(shape) * (manifest.noise.steps - 1)).astype(np.float32)
        elif spec.name == "labels":
            values[spec.name] = rng.choice(labels, shape).astype(np.int64)
        elif spec.name == "input_ids":
            values[spec.name] = _texts(network, shape[0], rng)
        elif spec.name == "time_ids":  # sizes in pixels
            values[spec.name] = rng.integers(0, 1025, shape).astype(np.float32)
        elif spec.name in ("control", "control_scale"):
            values[spec.name] = rng.random(shape, np.float32)
        elif spec.name == "image":
            values[spec.name] = 2 * rng.random(shape, np.float32) - 1
        else:
            values[spec.name] = rng.standard_normal(shape, np.float32)
        if spec.name == "inpaint":  # the mask comes first
            values[spec.name][:, :1] = values[spec.name][:, :1] > 0
    return values


def _texts(network: Network, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    layout = TokenLayout.of(network)
    special = {layout.bos, layout.eos, layout.pad}
    words = [n for n in range(int(network.config.get("vocabulary", max(special) + 1))) if n not in special]
    rows = []
    for _ in range(count):
        length = int(rng.integers(0, layout.room + 1)) if words else 0
        rows.append(layout.lay_out([int(word) for word in rng.choice(words, length)] if length else [], 1))
    return np.concatenate(rows)
