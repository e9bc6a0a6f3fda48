"""Real pictures that samples are compared with: their statistics, and their features where the file has any.

Files are ``.npz``. Pictures: ``arr_0`` uint8 ``[N,H,W,C]``; statistics: ``mu`` ``[F]`` and ``sigma`` ``[F,F]`` (both as
in ADM's reference batches, arXiv 2105.05233) or ``mean``, ``covariance`` and ``count``; features of our own files:
``features`` ``[N,F]``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.files import hash_file
from tstitch_engines.bundle.identity import digest
from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.files import Arrays, load_array, open_arrays, save_array
from tstitch_trt.study.quality.gaussian import Gaussian, frechet_distance, gaussian_of
from tstitch_trt.study.quality.network import FeatureNetwork

__all__ = ["MOST", "Reference", "knows_pictures", "read_reference", "thinned"]

_log = logging.getLogger(__name__)

MOST: Final = 10_000  # features that all pairs are taken of (kernel distance, precision, recall)
_BLOCK: Final = 256  # pictures of a reference between two saves
_SAME: Final = 0.3  # of the total variance: thousands of pictures are closer to their whole set, two networks are not
_MOST_PICTURES: Final = 10**9
_HOW: Final = "numpy.savez(FILE, pictures) of uint8 [N,H,W,C] makes a reference, as do the evaluators of ADM"


@dataclass(frozen=True, eq=False)
class Reference:
    """``gaussian``: of all ``count`` pictures (0: unknown). ``features`` float32 ``[M,F]``: of some, or ``None``."""

    name: str
    sha256: str
    count: int
    gaussian: Gaussian
    features: NDArray[np.float32] | None

    @property
    def width(self) -> int:
        """Features per picture."""
        return int(self.gaussian.mean.shape[0])

    def require_features(self, metric: str) -> NDArray[np.float32]:
        """At most ``MOST`` of them. Raises ``Unavailable`` where the reference has statistics alone."""
        if self.features is None:
            raise Unavailable(
                f"{metric} needs the features of real pictures one by one, and {self.name} has only their statistics",
                hint=f"give real pictures: --reference FILE.npz ({_HOW}); or build the bundle again",
            )
        return thinned(self.features)


def knows_pictures(path: Path) -> bool:
    """Whether a reference has pictures or features one by one; ``False`` for what can't be read."""
    try:
        with open_arrays(path) as archive:
            return bool({"arr_0", "features"} & set(archive.names))
    except (OSError, ValueError):
        return False


def thinned(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """At most ``MOST`` rows, in equal distances."""
    if len(features) <= MOST:
        return features
    return np.asarray(features[np.linspace(0, len(features) - 1, MOST).round().astype(int)])


def read_reference(
    path: Path, network: FeatureNetwork, *, picture: tuple[int, int, int] | None, cache: Path | None = None
) -> Reference:
    """``path`` in the features of ``network``. ``picture``: height, width and channels that pictures must have.

    ``cache``: a folder in which the features of pictures are kept, block by block: a large network takes its time.
    Raises ``BadInput`` for a file that is no reference, and for one of other pictures or of another network.
    """
    if not path.is_file():
        raise BadInput(f"the reference {path} does not exist", hint=_HOW)
    sha256 = hash_file(path)[0]
    try:
        with open_arrays(path) as archive:
            names = set(archive.names)
            statistics = _statistics(archive)
            features = archive.read("features").astype(np.float32) if "features" in names else None
            pictures = archive.read("arr_0") if "arr_0" in names else None
        if features is not None and not (features.ndim == 2 and len(features) > 1 and np.isfinite(features).all()):
            raise ValueError(f"features {list(features.shape)} are no finite [N,F] with N >= 2")
    except (OSError, ValueError) as error:
        raise BadInput(f"the reference {path} can't be read: {error}", hint=_HOW) from None
    if pictures is not None:
        features = _features_of(
            path, pictures, network, picture, cache and cache / digest([network.identity, sha256])[:20]
        )
    if features is None and statistics is None:
        raise BadInput(
            f"the reference {path.name} holds {', '.join(sorted(names)) or 'nothing'}; allowed are arr_0, mu and "
            "sigma, or mean, covariance and count",
            hint=_HOW,
        )
    if statistics is None or (pictures is not None and not _same_network(path, statistics, features)):
        assert features is not None
        statistics = gaussian_of(features)
    count = statistics.count or (0 if features is None else len(features))
    return Reference(path.name, sha256, count, statistics, features)


def _same_network(path: Path, statistics: Gaussian, features: NDArray[np.float32] | None) -> bool:
    """Whether statistics beside pictures are of the network that gave ``features``.

    They may be of more pictures, and are then better; those of another network are far away.
    """
    if features is None or features.shape[1:] != statistics.mean.shape:
        return False
    apart = frechet_distance(gaussian_of(features), statistics)
    same = apart <= _SAME * float(np.trace(statistics.covariance))
    if not same:
        _log.warning("%s: its statistics are of another feature network; its pictures alone are used", path.name)
    return same


def _statistics(archive: Arrays) -> Gaussian | None:
    for mean, covariance in (("mean", "covariance"), ("mu", "sigma")):
        if {mean, covariance} <= set(archive.names):
            a, b = (archive.read(name).astype(np.float64) for name in (mean, covariance))
            if a.ndim != 1 or b.shape != (len(a), len(a)) or not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise ValueError(f"{mean} {list(a.shape)} and {covariance} {list(b.shape)} are no finite [F] and [F,F]")
            count = archive.read("count") if "count" in archive.names else np.array(0)
            if count.size != 1 or not 0 <= count <= _MOST_PICTURES:
                raise ValueError(f"count is {count.reshape(-1)[:4]}; allowed is a number up to {_MOST_PICTURES:,}")
            return Gaussian(a, b, int(count.reshape(-1)[0]))
    return None


def _features_of(
    path: Path,
    pictures: NDArray[Any],
    network: FeatureNetwork,
    picture: tuple[int, int, int] | None,
    cache: Path | None,
) -> NDArray[np.float32]:
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or len(pictures) < 2:
        raise BadInput(
            f"arr_0 of the reference {path.name} is {pictures.dtype}{list(pictures.shape)}; allowed is uint8 [N,H,W,C] "
            "with N >= 2",
            hint=_HOW,
        )
    if picture is not None and pictures.shape[1:] != picture:
        have, want = ("x".join(map(str, shape)) for shape in (pictures.shape[1:], picture))
        raise BadInput(
            f"the reference {path.name} has pictures of {have} (height, width, channels); the bundle draws {want}",
            hint="a distance between pictures of two sizes means nothing: use real pictures of the bundle's own size",
        )
    if cache is None:
        return network.extract(pictures)[0]
    cache.mkdir(parents=True, exist_ok=True)
    blocks = []
    for start in range(0, len(pictures), _BLOCK):
        kept, part = cache / f"{start:07d}.npy", pictures[start : start + _BLOCK]
        found = load_array(kept, option="cached features") if kept.is_file() else None
        if found is None or len(found) != len(part):
            found = network.extract(part)[0]
            save_array(kept, found)
        blocks.append(found)
    return np.concatenate(blocks)
