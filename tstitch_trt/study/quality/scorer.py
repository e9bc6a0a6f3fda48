"""Metrics of a bundle's pictures with their intervals, for ``evaluate`` and ``search``.

scorer = Scorer.of(bundle, metric="fid")
features = join([scorer.extract(images) for images in batches])
scorer.measure(features).value
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.identity import digest
from tstitch_engines.bundle.manifest import Manifest, Quality
from tstitch_engines.child import DEFAULT, Limits
from tstitch_engines.errors import BadInput, Unavailable, Untrusted, unknown_name
from tstitch_engines.threads import check_threads
from tstitch_trt.study.quality.clip import Clip
from tstitch_trt.study.quality.gaussian import FrechetTo, gaussian_of
from tstitch_trt.study.quality.kernel import KernelTo
from tstitch_trt.study.quality.manifold import NEIGHBOURS, Manifold, recall_halves
from tstitch_trt.study.quality.network import FeatureNetwork, NetworkOptions
from tstitch_trt.study.quality.pairs import Lpips, decibels, squared_errors
from tstitch_trt.study.quality.real_images import MOST, Reference, read_reference, thinned
from tstitch_trt.study.quality.resampling import (
    RESAMPLES,
    Estimate,
    bootstrap_counts,
    estimate,
    estimate_mean,
    estimate_median,
)
from tstitch_trt.study.records import METRICS, Measure
from tstitch_trt.study.statistics import compare_rows

__all__ = ["Features", "Samples", "Scorer", "check_metrics", "join"]

Features = dict[str, NDArray[Any]]
"""What metrics need of N pictures: arrays ``[N,...]`` by the names in ``_METRICS``."""

_BY_NETWORK: Final = ("fid", "kid", "precision", "recall")
_PAIRED: Final = ("squared_error", "lpips", "latent_error")  # features of two pictures from one seed
_EASY_WIDTH: Final = 256  # with more features one resample of the Fréchet distance takes seconds
_LEAST_RESAMPLES: Final = 10
_RECALL_HALVES: Final = 100
_ENOUGH: Final = 20  # samples per feature; with fewer the bias of the Fréchet distance is noted


@dataclass(frozen=True, eq=False)
class Samples:
    """Pictures uint8 ``[N,H,W,C]``, ``None`` where nothing is decoded, and their final latents ``[N,C,h,w]``."""

    images: NDArray[np.uint8] | None
    latents: NDArray[np.float32]


def join(parts: Sequence[Features]) -> Features:
    """The features of several batches as those of one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    """Each once, in the order of ``METRICS``. Raises ``UnknownName`` naming the nearest, ``BadInput`` for none."""
    for name in metrics:
        if name not in METRICS:
            raise unknown_name("metric", name, METRICS)
    if not metrics:
        raise BadInput("no metric was asked for", hint=f"name some of: {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in metrics)


@dataclass(frozen=True, eq=False)
class Scorer:
    """One or several metrics of one bundle, and the networks that they need. Made by ``Scorer.of``."""

    metrics: tuple[str, ...]
    network: FeatureNetwork | None = None
    reference: Reference | None = None
    classifier: FeatureNetwork | None = None
    lpips: Lpips | None = None
    clip: Clip | None = None

    @staticmethod
    def of(
        bundle: Bundle,
        metric: str | Sequence[str] = "fid",
        *,
        reference: Path | None = None,
        features: Path | None = None,
        options: NetworkOptions | None = None,
        lpips: Path | None = None,
        clip: Path | None = None,
        threads: int = 0,
        cache: Path | None = None,
        limits: Limits = DEFAULT,
    ) -> Scorer:
        """The scorer of an open bundle.

        ``reference``: real pictures or their statistics (``tstitch_trt.study.quality.real_images``), by default the
        bundle's own. ``features``: a feature network with its ``options`` (``tstitch_trt.study.quality.network``), by
        default the bundle's own. ``lpips``, ``clip``: networks that these two metrics need. ``threads``: 0 for all
        cores.
        ``limits``: of the child process that runs the networks, for each batch.
        ``cache``: a folder that keeps the features of a reference's pictures from one time to the next.

        Raises ``UnknownName`` for an unknown metric and ``Unavailable`` for one that lacks what it needs.
        """
        metrics = check_metrics([metric] if isinstance(metric, str) else metric)
        check_threads(threads)
        manifest = bundle.manifest
        if manifest.decoder.kind == "none" and set(metrics) - {"latent_error"}:
            raise Unavailable(
                f"the bundle {manifest.name!r} has no decoder, so there are no pictures to measure",
                hint="measure latents: --metrics latent_error; or build the bundle with a VAE",
            )
        if "lpips" in metrics and lpips is None:
            raise Unavailable(
                "lpips needs a network, and none comes with this package",
                hint="give yours as ONNX or TorchScript: --lpips FILE (two batches of pictures in [-1,1] to distances)",
            )
        if "clip" in metrics:
            _check_clip(manifest, clip)
        network = judge = None
        if set(metrics) & {*_BY_NETWORK, "accuracy"}:
            own = None
            if manifest.quality is not None and (features is None or "accuracy" in metrics):
                own = FeatureNetwork(_own_network(bundle, manifest.quality), threads=threads, limits=limits)
            given = (
                None if features is None else FeatureNetwork(features, options=options, threads=threads, limits=limits)
            )
            network = given or own
            judge = next((net for net in (own, given) if net is not None and net.classifies), None)
        found = None
        if set(metrics) & {*_BY_NETWORK}:
            if network is None:
                raise Unavailable(
                    f"the bundle {manifest.name!r} has no feature network for {', '.join(metrics)}",
                    hint="give one with --features FILE and real pictures with --reference FILE.npz, or measure "
                    "without: --metrics psnr,latent_error",
                )
            found = _reference(bundle, network, reference, own=features is None, cache=cache)
        if "accuracy" in metrics and judge is None:
            raise Unavailable(
                f"accuracy needs a classifier: the bundle {manifest.name!r} has none, and --features no output logits",
                hint="leave accuracy out of --metrics, or give a classifier with the outputs features and logits",
            )
        scorer = Scorer(
            metrics,
            network=network if found is not None else None,
            reference=found,
            classifier=judge if "accuracy" in metrics else None,
            lpips=Lpips(lpips, threads=threads, limits=limits) if "lpips" in metrics and lpips is not None else None,
            clip=Clip(clip, threads=threads, limits=limits) if "clip" in metrics and clip is not None else None,
        )
        if found is not None:
            for name in ("kid", "precision", "recall"):
                if name in metrics:
                    found.require_features(name)
        return scorer

    @property
    def metric(self) -> str:
        """The only, or the first, of the metrics."""
        return self.metrics[0]

    @property
    def paired(self) -> bool:
        """Whether a metric compares with the large member alone, so that ``extract`` needs ``against``."""
        return any(_METRICS[name].feature in _PAIRED for name in self.metrics)

    def sources(self, reference: Any = None) -> dict[str, str]:
        """The features that ``extract`` finds, each with a digest of all that decides it beside the pictures.

        ``reference``: the setting that paired features compare with.
        """
        networks: dict[str, Any] = {
            "features": None if self.network is None else self.network.identity,
            "correct": None if self.classifier is None else self.classifier.identity,
            "lpips": None if self.lpips is None else self.lpips.sha256,
            "clip": None if self.clip is None else self.clip.sha256,
        }
        found = {name: digest(networks.get(name)) for name in dict.fromkeys(_METRICS[m].feature for m in self.metrics)}
        if reference is None:
            return found
        return {name: digest([text, reference]) if name in _PAIRED else text for name, text in found.items()}

    def extract(
        self,
        images: NDArray[np.uint8] | None,
        *,
        labels: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        latents: NDArray[np.float32] | None = None,
        against: Samples | None = None,
        only: Sequence[str] | None = None,
    ) -> Features:
        """The features of pictures uint8 ``[N,H,W,C]`` that the metrics need.

        ``labels`` or ``prompts``: what each was asked to be (accuracy, clip). ``latents``: their own, and ``against``:
        the large member's samples from the same seeds (paired metrics). ``only``: some of ``sources``, by default all.
        Raises ``BadInput`` for what is missing.
        """
        wanted = self.sources() if only is None else only
        pixels: Any = images  # None where no wanted feature reads pictures
        network: Any = self.network
        found: Features = {}
        logits = None
        if "features" in wanted:
            found["features"], logits = network.extract(pixels)
        if "correct" in wanted:
            if labels is None:
                raise BadInput("accuracy needs the labels that the pictures were asked for", hint="pass labels=")
            classifier: Any = self.classifier
            if classifier is not network or logits is None:
                _, logits = classifier.extract(pixels)
            found["correct"] = logits.argmax(1) == np.asarray(labels)
        if "clip" in wanted:
            if prompts is None:
                raise BadInput("clip needs the prompts that the pictures were asked for", hint="pass prompts=")
            assert self.clip is not None
            found["clip"] = self.clip(pixels, prompts)
        if not set(_PAIRED) & set(wanted):
            return found
        if against is None:
            raise BadInput(
                "a paired metric compares with what the large member draws from the same seeds", hint="pass against="
            )
        others: Any = against.images
        if "squared_error" in wanted:
            found["squared_error"] = squared_errors(pixels, others)
        if "lpips" in wanted:
            assert self.lpips is not None
            found["lpips"] = self.lpips(pixels, others)
        if "latent_error" in wanted:
            if latents is None:
                raise BadInput("latent_error compares latents", hint="pass latents=")
            found["latent_error"] = compare_rows(latents, against.latents)[1]
        return found

    def measure(self, features: Features, metric: str | None = None, *, resamples: int = RESAMPLES) -> Measure:
        """The value and interval of ``metric`` (by default the first). Raises ``BadInput`` for too few samples."""
        return self.estimate(features, metric, resamples=resamples).measure

    def estimate(self, features: Features, metric: str | None = None, *, resamples: int = RESAMPLES) -> Estimate:
        """The same with its resamples, for comparison with as many samples from the same seeds."""
        name = metric or self.metric
        if name not in self.metrics:
            raise unknown_name("metric", name, self.metrics)
        kind = _METRICS[name]
        found = kind.estimate(self, features[kind.feature], resamples)
        m = found.measure
        bounded = Measure(
            value=m.value,
            low=max(m.low, kind.least),
            high=min(m.high, kind.most),
            std=m.std,
            bias=self.bias(features[kind.feature]) if name == "fid" else 0.0,
            deviations=found.packed(),
        )
        return Estimate(bounded, found.deviations)

    def measures(self, features: Features, *, resamples: int = RESAMPLES) -> dict[str, Measure]:
        """All metrics but a psnr that is infinite because all pictures are equal."""
        found = {name: self.measure(features, name, resamples=resamples) for name in self.metrics}
        return {name: measure for name, measure in found.items() if np.isfinite(measure.value)}

    def _fid(self, features: NDArray[np.float32], resamples: int) -> Estimate:
        width = features.shape[1]
        if width > _EASY_WIDTH:
            resamples = max(_LEAST_RESAMPLES, int(resamples * (_EASY_WIDTH / width) ** 2))
        counts = bootstrap_counts(len(features), resamples)
        return estimate(self._frechet(gaussian_of(features)), self._frechet.resampled(features, counts))

    def _kid(self, features: NDArray[np.float32], resamples: int) -> Estimate:
        features = thinned(features)
        counts = bootstrap_counts(len(features), resamples)
        return estimate(self._kernel(features), self._kernel.resampled(features, counts))

    def _precision(self, features: NDArray[np.float32], resamples: int) -> Estimate:
        return estimate_mean(self._manifold.holds(thinned(features)), resamples)

    def _recall(self, features: NDArray[np.float32], resamples: int) -> Estimate:
        features, real = thinned(features), self._real
        value = float(Manifold(features).holds(real).mean())
        if len(features) < 2 * (NEIGHBOURS + 1):
            raise BadInput(
                f"{len(features)} samples are too few for the interval of recall; allowed is {2 * (NEIGHBOURS + 1)} or "
                "more",
                hint="draw more: --samples",
            )
        return estimate(value, recall_halves(features, real, halves=min(resamples, _RECALL_HALVES)))

    def _psnr(self, errors: NDArray[np.float64], resamples: int) -> Estimate:
        mean = float(errors.mean())
        if mean == 0:
            return Estimate(Measure(value=np.inf, low=np.inf, high=np.inf, std=0.0), np.zeros(resamples))
        counts = bootstrap_counts(len(errors), resamples)
        least = errors[errors > 0].min() / len(errors)  # a resample of equal pairs alone would be infinite
        means = np.maximum(counts @ errors / len(errors), least)
        return estimate(float(decibels(mean)), decibels(means))

    @cached_property
    def _frechet(self) -> FrechetTo:
        assert self.reference is not None
        return FrechetTo(self.reference.gaussian)

    @cached_property
    def _real(self) -> NDArray[np.float32]:
        assert self.reference is not None
        return self.reference.require_features("a distance of all pairs")

    @cached_property
    def _kernel(self) -> KernelTo:
        return KernelTo(self._real)

    @cached_property
    def _manifold(self) -> Manifold:
        return Manifold(self._real)

    def bias(self, features: NDArray[np.float32]) -> float:
        """The bias of the Fréchet distance of features ``[N,F]``, at most the distance itself.

        It falls as ``1/N`` (Chong and Forsyth, arXiv 1911.07023), so half of the samples have twice of it: the mean
        distance of two halves less that of the whole. The halves are random because classes go round. Of fewer than 4
        samples all of the distance counts as bias.
        """
        if len(features) < 4:
            return self._frechet(gaussian_of(features))
        order = np.random.default_rng(0).permutation(len(features))
        halves = [self._frechet(gaussian_of(features[half])) for half in np.array_split(order, 2)]
        value = self._frechet(gaussian_of(features))
        return min(max(0.0, float(np.mean(halves)) - value), value)

    def notes(self, samples: int, features: Features | None = None) -> list[str]:
        """Warnings about metrics of ``samples`` pictures. With their ``features`` the bias is estimated too."""
        notes: list[str] = []
        if self.reference is None:
            return notes
        width = self.reference.width
        if "fid" in self.metrics and samples < _ENOUGH * width:
            text = f"{samples} samples are few for {width} features ({_ENOUGH * width} would do): fid is biased upwards"
            if features is not None:
                value = self._frechet(gaussian_of(features["features"]))
                text += f", by about {self.bias(features['features']):.3g} of {value:.3g}"
            notes.append(text + "; compare only values of equally many samples")
        if "fid" in self.metrics and 0 < self.reference.count <= width:
            notes.append(
                f"the reference has {self.reference.count} pictures for {width} features: its covariance is singular"
            )
        pairs = [name for name in ("kid", "precision", "recall") if name in self.metrics]
        known = 0 if self.reference.features is None else len(self.reference.features)
        if pairs and max(samples, known) > MOST:
            notes.append(f"{', '.join(pairs)}: of {MOST:,} samples and reference pictures at most")
        return notes


def _own_network(bundle: Bundle, quality: Quality) -> Path:
    """The bundle's own feature network. Raises ``Untrusted`` for a script, which may read and write files."""
    path = bundle.path(quality.network)
    if path.suffix != ".onnx" and not bundle.vouched:
        raise Untrusted(
            f"the bundle's feature network {path.name} is a TorchScript program, which may read and write files; "
            "allowed in a bundle is ONNX",
            hint=f"if you trust it, name it yourself: --features {path} --reference {bundle.path(quality.reference)}",
        )
    return path


def _reference(
    bundle: Bundle, network: FeatureNetwork, path: Path | None, *, own: bool, cache: Path | None
) -> Reference:
    manifest = bundle.manifest
    if path is None:
        if manifest.quality is None or not own:
            raise Unavailable(
                "the bundle has no reference in the features of this network",
                hint="give real pictures: --reference FILE.npz (arr_0 uint8 [N,H,W,C], or mu and sigma)",
            )
        found = read_reference(bundle.path(manifest.quality.reference), network, picture=None)
    else:
        found = read_reference(path, network, picture=picture_shape(manifest), cache=cache)
    width = network.extract(np.zeros((1, *picture_shape(manifest)), np.uint8))[0].shape[1]
    if width != found.width:
        raise BadInput(
            f"the reference {found.name} is of {found.width} features; {network.name} gives {width}",
            hint="take statistics that the same network made, or a reference with pictures (arr_0)",
        )
    return found


def picture_shape(manifest: Manifest) -> tuple[int, int, int]:
    """Height, width and channels of the pictures that a bundle draws in its own size."""
    latent, factor = manifest.latent, manifest.decoder.factor
    channels = latent.channels if manifest.decoder.kind == "pixel" else 3
    return latent.height * factor, latent.width * factor, channels


def _check_clip(manifest: Manifest, clip: Path | None) -> None:
    if manifest.conditioning.kind != "text":
        raise Unavailable(
            f"clip compares pictures with prompts, and the bundle {manifest.name!r} draws classes",
            hint="leave clip out of --metrics",
        )
    if clip is None:
        raise Unavailable(
            "clip needs a network, and none comes with this package",
            hint="give the folder of a CLIP model: --clip DIR (transformers, or image and text networks)",
        )


class _Metric(NamedTuple):
    """``feature``: what it is computed from. ``least``, ``most``: no interval reaches beyond them."""

    feature: str
    estimate: Callable[[Scorer, NDArray[Any], int], Estimate]
    least: float = -math.inf
    most: float = math.inf


def _mean(_: Scorer, values: NDArray[Any], resamples: int) -> Estimate:
    return estimate_mean(values, resamples)


_METRICS: Final = {
    "fid": _Metric("features", Scorer._fid, 0.0),
    "kid": _Metric("features", Scorer._kid),
    "precision": _Metric("features", Scorer._precision, 0.0, 1.0),
    "recall": _Metric("features", Scorer._recall, 0.0, 1.0),
    "accuracy": _Metric("correct", _mean, 0.0, 1.0),
    "psnr": _Metric("squared_error", Scorer._psnr),
    "lpips": _Metric("lpips", _mean, 0.0),
    "clip": _Metric("clip", _mean),
    "latent_error": _Metric("latent_error", lambda _, values, resamples: estimate_median(values, resamples), 0.0),
}
