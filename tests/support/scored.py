"""The tiny pair with a feature network and a reference of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support.networks import means_network
from support.tiny import CHANNELS, TinyPair
from tstitch_engines.spec import Range
from tstitch_export.build import build

__all__ = ["scored_bundle"]


def scored_bundle(tiny_pair: TinyPair, folder: Path, *, features: bool = True) -> Path:
    """Its pictures are of four channels, and their features the means of these. ``features``: the reference has some
    for each picture, not statistics alone."""
    network, reference = means_network(folder, channels=CHANNELS)
    if features:
        real = np.random.default_rng(0).standard_normal((60, CHANNELS)) * 0.2
        np.savez(reference, mean=real.mean(0), covariance=np.cov(real.T), count=60, features=real.astype(np.float16))
    recipe = folder / "scored.toml"
    quality = f'[quality]\nnetwork = "{network.name}"\nreference = "{reference.name}"\n'
    recipe.write_text(tiny_pair.recipe("small", "large").read_text() + quality)
    members = {name: tiny_pair.checkpoint(name) for name in ("small", "large")}
    build(recipe, members=members, output=folder / "scored.bundle", profile=Range(1, 4, 8))
    return folder / "scored.bundle"
