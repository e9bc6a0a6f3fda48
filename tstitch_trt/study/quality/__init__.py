"""How good pictures are: distances between distributions, precision and recall, accuracy, and pairs of equal seeds."""

from tstitch_trt.study.quality.gaussian import FrechetTo, Gaussian, frechet_distance, gaussian_of
from tstitch_trt.study.quality.kernel import KernelTo, kernel_distance
from tstitch_trt.study.quality.manifold import Manifold
from tstitch_trt.study.quality.meter import QualityMeter, Score, accuracy
from tstitch_trt.study.quality.network import FeatureNetwork, NetworkOptions
from tstitch_trt.study.quality.real_images import Reference, read_reference
from tstitch_trt.study.quality.scorer import PAIRED, Drawn, Scorer, Seen, check_metrics, join

__all__ = [
    "PAIRED",
    "Drawn",
    "FeatureNetwork",
    "FrechetTo",
    "Gaussian",
    "KernelTo",
    "Manifold",
    "NetworkOptions",
    "QualityMeter",
    "Reference",
    "Score",
    "Scorer",
    "Seen",
    "accuracy",
    "check_metrics",
    "frechet_distance",
    "gaussian_of",
    "join",
    "kernel_distance",
    "read_reference",
]
