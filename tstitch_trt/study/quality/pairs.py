"""Metrics of a picture against the large member's from the same seed, one value for each pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.files import hash_file
from tstitch_engines.child import DEFAULT, Limits
from tstitch_engines.errors import BadInput
from tstitch_trt.study.quality.foreign import ForeignNetwork
from tstitch_trt.study.quality.network import scaled

__all__ = ["Lpips", "decibels", "squared_errors"]

_BATCH = 32


def squared_errors(images: NDArray[np.uint8], against: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The mean squared difference of each pair of pictures uint8 ``[N,H,W,C]``, float64 ``[N]``."""
    difference = images.astype(np.float64) - against.astype(np.float64)
    return np.asarray((difference**2).reshape(len(images), -1).mean(1))


def decibels(mean_squared: Any) -> Any:
    """Peak signal-to-noise ratio of pictures in 0..255 from their mean squared error: ``10 log10(255^2 / mse)``.

    For a set of pictures use their mean error, so that one pair of equal pictures does not make it infinite.
    """
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / np.asarray(mean_squared, np.float64))


class Lpips:
    """A perceptual distance (Zhang et al., arXiv 1801.03924) by the user's network.

    ONNX or TorchScript: two batches of pictures float32 ``[N,C,H,W]`` in [-1, 1] to distances ``[N]`` (``[N,1,1,1]``
    as well), as ``lpips.LPIPS(...)`` takes and gives them.
    """

    def __init__(self, path: Path, *, threads: int = 0, limits: Limits = DEFAULT) -> None:
        self._net = ForeignNetwork(path, threads=threads, what="LPIPS network", limits=limits)
        if len(self._net.facts.inputs) < 2:
            raise BadInput(
                f"the LPIPS network {path.name} takes {len(self._net.facts.inputs)} input; allowed are two, batches of "
                "pictures in [-1, 1]",
                hint="trace or export lpips.LPIPS(...) with two example pictures",
            )
        self._name = path.name
        self.sha256 = hash_file(path)[0]

    def __call__(self, images: NDArray[np.uint8], against: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The distance of each pair of pictures uint8 ``[N,H,W,C]``, float64 ``[N]``."""
        facts = self._net.facts
        channels = facts.channels or (3 if facts.scripted else images.shape[-1])
        found = []
        for start in range(0, len(images), _BATCH):
            pair = [
                scaled(part[start : start + _BATCH], "-1:1", channels=channels, size=facts.size, what="LPIPS")
                for part in (images, against)
            ]
            answer = np.asarray(next(iter(self._net.run(pair).values())), np.float64)
            if answer.size != len(pair[0]):
                raise BadInput(
                    f"the LPIPS network {self._name} gives {list(answer.shape)} for {len(pair[0])} pairs; allowed is "
                    "[N]",
                    hint="export it with spatial=False and without a mean over the batch",
                )
            found.append(answer.reshape(-1))
        return np.concatenate(found)
