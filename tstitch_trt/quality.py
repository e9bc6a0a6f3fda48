"""How good samples are: Fréchet distance and class accuracy in the features of a bundle's quality network.

The distance is that of the Fréchet Inception Distance (Heusel et al., arXiv 1706.08500) with the bundle's own network
in place of Inception: it compares schedules of one bundle with each other, not with published FIDs. It is biased
upwards for few samples; compare only numbers made from equally many.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadBundle, BadInput, Unavailable

__all__ = ["Gaussian", "QualityMeter", "Score", "accuracy", "frechet_distance", "gaussian_of"]

Doubles = NDArray[np.float64]


class Gaussian(msgspec.Struct, frozen=True):
    """Mean ``[F]`` and covariance ``[F,F]`` of ``count`` feature vectors, float64."""

    mean: Doubles
    covariance: Doubles
    count: int


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """``frechet``: distance to held-out real images; ``accuracy``: share of samples the network files under the label
    they were asked for; ``samples``: how many were scored."""

    frechet: float
    accuracy: float
    samples: int


def gaussian_of(features: NDArray[Any]) -> Gaussian:
    """Mean and unbiased covariance of features ``[N,F]``, N >= 2."""
    if features.ndim != 2 or len(features) < 2:
        raise BadInput(
            f"features of shape {list(features.shape)} have no covariance; allowed is [N, F] with N >= 2",
            hint="score at least 2 samples: --samples 2",
        )
    exact = features.astype(np.float64)
    return Gaussian(exact.mean(0), np.atleast_2d(np.cov(exact, rowvar=False)), len(exact))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`` (Dowson and Landau, 1982), in float64.

    ``tr (S_a S_b)^(1/2)`` is the sum of the square roots of the eigenvalues of the symmetric ``R S_b R`` with
    ``R = S_a^(1/2)``: real and non-negative even when a covariance is singular (fewer samples than features), where
    a general matrix square root breaks down.
    """
    if a.mean.shape != b.mean.shape:
        raise BadInput(
            f"features of {a.mean.shape[0]} and {b.mean.shape[0]} dimensions can't be compared",
            hint="take both statistics from the same network",
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    mixed = np.sqrt(np.clip(cross, 0, None)).sum()
    difference = a.mean - b.mean
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * mixed
    return max(float(distance), 0.0)  # equal Gaussians may come out a rounding below zero


def accuracy(logits: NDArray[Any], labels: NDArray[np.integer[Any]]) -> float:
    """Share of rows of ``logits [N,K]`` whose largest entry is at ``labels [N]``."""
    return float((logits.argmax(1) == labels).mean())


class QualityMeter:
    """The quality network of a bundle on ONNX Runtime (CPU) and the statistics of held-out real images."""

    def __init__(self, network: Path, reference: Path, *, threads: int = 0) -> None:
        """``network``: ONNX with one input, images float32 ``[N,C,H,W]`` in [-1, 1], and the outputs ``features
        [N,F]`` and ``logits [N,K]``. ``reference``: ``.npz`` with ``mean``, ``covariance`` and ``count``."""
        try:
            import onnxruntime
        except ImportError:
            raise Unavailable(
                "quality needs ONNX Runtime, which is not installed", hint='run: pip install "tstitch-trt[cpu]"'
            ) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(network), options, providers=["CPUExecutionProvider"])
        inputs, outputs = self._session.get_inputs(), {o.name for o in self._session.get_outputs()}
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or not {"features", "logits"} <= outputs:
            raise BadBundle(
                f"quality network {network.name} takes {[(i.name, i.type) for i in inputs]}, gives {sorted(outputs)}; "
                "allowed is one float32 image input and the outputs features and logits",
                hint="build the bundle again: tstitch-trt build RECIPE",
            )
        self._input = inputs[0].name
        with np.load(reference, allow_pickle=False) as held_out:
            self.reference = Gaussian(held_out["mean"], held_out["covariance"], int(held_out["count"]))

    @staticmethod
    def of(bundle: Any, *, threads: int = 0) -> QualityMeter:
        """The meter of an open bundle. Raises ``Unavailable`` when it has no quality network."""
        quality = bundle.manifest.quality
        if quality is None:
            raise Unavailable(
                f"bundle {bundle.manifest.name!r} has no quality network", hint="use a recipe that has one: fashion"
            )
        return QualityMeter(bundle.path(quality.network), bundle.path(quality.reference), threads=threads)

    def look(self, images_NHWC: NDArray[np.uint8], *, batch: int = 256) -> tuple[NDArray[np.float32], Any]:
        """Features ``[N,F]`` and logits ``[N,K]`` of uint8 images, float32."""
        features, logits = [], []
        for start in range(0, len(images_NHWC), batch):
            part = images_NHWC[start : start + batch].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
            f, k = self._session.run(["features", "logits"], {self._input: np.ascontiguousarray(part)})
            features.append(f)
            logits.append(k)
        return np.concatenate(features), np.concatenate(logits)

    def score(
        self, features: NDArray[Any], logits: NDArray[Any], labels: NDArray[np.integer[Any]] | list[int]
    ) -> Score:
        """The score of samples that were asked for as ``labels``. Raises ``BadInput`` for fewer than 2 samples."""
        return Score(
            frechet=frechet_distance(gaussian_of(features), self.reference),
            accuracy=accuracy(logits, np.asarray(labels)),
            samples=len(features),
        )
