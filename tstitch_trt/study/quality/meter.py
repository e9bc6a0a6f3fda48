"""The Fréchet distance and class accuracy that a bundle's own quality network finds: the short way, without intervals.

It compares schedules of one bundle with each other, not with published FIDs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.errors import BadBundle, Unavailable
from tstitch_trt.study.quality.gaussian import frechet_distance, gaussian_of
from tstitch_trt.study.quality.network import FeatureNetwork
from tstitch_trt.study.quality.real_images import read_reference

__all__ = ["QualityMeter", "Score", "accuracy"]


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """``frechet``: distance to held-out real images; ``accuracy``: share of samples the network files under the label
    they were asked for; ``samples``: how many were scored."""

    frechet: float
    accuracy: float
    samples: int


def accuracy(logits: NDArray[Any], labels: NDArray[np.integer[Any]]) -> float:
    """Share of rows of ``logits [N,K]`` whose largest entry is at ``labels [N]``."""
    return float((logits.argmax(1) == labels).mean())


class QualityMeter:
    """The quality network of a bundle and the statistics of held-out real images."""

    def __init__(self, network: Path, reference: Path, *, threads: int = 0) -> None:
        """``network``: ONNX with one input, images float32 ``[N,C,H,W]`` in [-1, 1], and the outputs ``features
        [N,F]`` and ``logits [N,K]``. ``reference``: ``.npz`` with ``mean``, ``covariance`` and ``count``."""
        self._network = FeatureNetwork(network, threads=threads)
        if not self._network.classifies:
            raise BadBundle(
                f"quality network {network.name} has no output logits; allowed is one image input and the outputs "
                "features and logits",
                hint="build the bundle again: tstitch-trt build RECIPE",
            )
        self.reference = read_reference(reference, self._network, picture=None).gaussian

    @staticmethod
    def of(bundle: Bundle, *, threads: int = 0) -> QualityMeter:
        """The meter of an open bundle. Raises ``Unavailable`` when it has no quality network."""
        quality = bundle.manifest.quality
        if quality is None:
            raise Unavailable(
                f"bundle {bundle.manifest.name!r} has no quality network", hint="use a recipe that has one: fashion"
            )
        return QualityMeter(bundle.path(quality.network), bundle.path(quality.reference), threads=threads)

    def extract(self, images_NHWC: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Features ``[N,F]`` and logits ``[N,K]`` of uint8 images, float32."""
        features, logits = self._network.extract(images_NHWC)
        assert logits is not None, "it classifies"
        return features, logits

    def score(
        self, features: NDArray[Any], logits: NDArray[Any], labels: NDArray[np.integer[Any]] | list[int]
    ) -> Score:
        """The score of samples that were asked for as ``labels``. Raises ``BadInput`` for fewer than 2 samples."""
        return Score(
            frechet=frechet_distance(gaussian_of(features), self.reference),
            accuracy=accuracy(logits, np.asarray(labels)),
            samples=len(features),
        )
