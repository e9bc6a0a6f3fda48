"""Feature networks: ONNX on ONNX Runtime or TorchScript on PyTorch, both on the CPU and in a child process.

Input, unless the options differ: pictures float32 ``[N,C,H,W]`` in [-1, 1]. They are resized (bicubic with
antialiasing, without rounding: Parmar et al., arXiv 2104.11222) where the network has a fixed size, and grey ones are
repeated where it wants three channels. Output: features ``[N,F]`` (``[N,F,1,1]`` is flattened), the
output called ``features``, else the first. A network with an output ``logits [N,K]`` besides is a classifier too.

A TorchScript network that takes ``return_features`` is Inception in the common form ``inception-2015-12-05.pt``: it is
given pictures in 0..255 in their own size, which it resizes itself, and ``return_features=True``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.files import hash_file
from tstitch_engines.child import DEFAULT, Limits
from tstitch_engines.errors import BadInput, unknown_name
from tstitch_trt.study.quality.foreign import LARGEST_SIDE, ForeignNetwork

__all__ = ["OPTIONS", "FeatureNetwork", "NetworkOptions", "resized", "scaled"]

ValueRange = Literal["-1:1", "0:1", "0:255"]
_RANGES: Final = get_args(ValueRange)
OPTIONS: Final = {
    "size": "pixels along each side that it is given, of a network that does not say so itself",
    "range": f"the pixels' values, one of {', '.join(_RANGES)}; -1:1 where nothing is said",
    "output": "the output to take, by name or by number from 0",
    "channels": "1 or 3, of a network that does not say so itself",
}
_BATCH = 64


class NetworkOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to call a network, where its file does not tell: ``OPTIONS``."""

    size: int = 0
    range: ValueRange | None = None
    output: str = ""
    channels: int = 0

    @staticmethod
    def parse(pairs: Mapping[str, str]) -> NetworkOptions:
        """Of texts, as the command line has them. Raises ``UnknownName`` or ``BadInput``."""
        given: dict[str, Any] = {}
        for name, value in pairs.items():
            if name not in OPTIONS:
                raise unknown_name("option of a feature network", name, OPTIONS)
            if name == "range" and value not in _RANGES:
                raise unknown_name("range", value, _RANGES)
            if name in ("size", "channels"):
                whole = value.isascii() and value.isdecimal() and value.lstrip("0") != ""
                if not whole or (name == "channels" and value not in ("1", "3")):
                    raise BadInput(f"option {name} is {value[:80]!r}; allowed: {OPTIONS[name]}", hint=f"e.g. {name}=3")
                if len(value) > 9 or int(value) > LARGEST_SIDE:
                    raise BadInput(
                        f"option {name} is {value[:20]}; allowed is at most {LARGEST_SIDE}", hint=f"e.g. {name}=3"
                    )
                given[name] = int(value)
            else:
                given[name] = value
        return NetworkOptions(**given)


class FeatureNetwork:
    """A loaded network. ``name``: its file's; ``sha256``: of the file."""

    def __init__(
        self, path: Path, *, options: NetworkOptions | None = None, threads: int = 0, limits: Limits = DEFAULT
    ) -> None:
        """``limits``: of loading it and of each batch.

        Raises ``BadInput`` for a file that is no such network, ``Unavailable`` for a missing library.
        """
        self.name = path.name
        self._options = options or NetworkOptions()
        self._net = ForeignNetwork(path, threads=threads, what="feature network", limits=limits)
        facts = self._net.facts
        if len(facts.inputs) != 1 and not facts.scripted:
            raise BadInput(
                f"the feature network {path.name} takes {len(facts.inputs)} inputs; allowed is one, pictures",
                hint="export it with one input [N,C,H,W]",
            )
        self._dtype = facts.dtype
        self._inception = "return_features" in facts.keywords
        self.channels = self._options.channels or facts.channels
        self.size = facts.size or ((self._options.size,) * 2 if self._options.size else None)
        self.classifies = "logits" in facts.outputs
        self.sha256 = hash_file(path)[0]

    @property
    def identity(self) -> dict[str, Any]:
        """All that its features depend on, beside the pictures."""
        return {"network": self.sha256, **msgspec.to_builtins(self._options)}

    def extract(self, images_NHWC: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Features ``[N,F]`` of uint8 pictures, and their logits ``[N,K]`` where it classifies.

        Raises ``BadInput`` for pictures that it can't take and for an output of a wrong shape.
        """
        features, logits = [], []
        for start in range(0, len(images_NHWC), _BATCH):
            part = self._prepared(images_NHWC[start : start + _BATCH])
            found = self._net.run([part], {"return_features": True} if self._inception else {})
            features.append(self._flat(self._pick(found), len(part)))
            if self.classifies:
                logits.append(np.asarray(found["logits"], np.float32))
        joined = np.concatenate(features)
        if not np.isfinite(joined).all():
            raise BadInput(
                f"the feature network {self.name} gives NaN or infinity", hint="check the range it wants (range=)"
            )
        return joined, np.concatenate(logits) if logits else None

    def _prepared(self, images_NHWC: NDArray[np.uint8]) -> NDArray[Any]:
        values = self._options.range or ("0:255" if self._inception or self._dtype == "uint8" else "-1:1")
        channels = self.channels or (3 if self._inception else images_NHWC.shape[-1])
        size = None if self._inception and not self._options.size else self.size
        pictures = scaled(images_NHWC, values, channels=channels, size=size, what=f"the feature network {self.name}")
        if self._dtype == "uint8":
            return np.clip(np.rint(pictures), 0, 255).astype(np.uint8)
        return pictures.astype(self._dtype, copy=False)

    def _pick(self, found: dict[str, Any]) -> Any:
        wanted = self._options.output
        if not wanted:
            return found["features"] if "features" in found else next(iter(found.values()))
        if wanted in found:
            return found[wanted]
        if wanted.isascii() and wanted.isdecimal() and len(wanted) < 10 and int(wanted) < len(found):
            return list(found.values())[int(wanted)]
        raise unknown_name("output", wanted, found, hint=f"(of the feature network {self.name})")

    def _flat(self, features: Any, count: int) -> NDArray[np.float32]:
        array = np.asarray(features, np.float32)
        if array.ndim >= 2 and len(array) == count and all(side == 1 for side in array.shape[2:]):
            return array.reshape(count, -1)
        raise BadInput(
            f"the feature network {self.name} gives {list(array.shape)} for {count} pictures; allowed is [N, F]",
            hint="pick another output (output=NAME), or export the network with pooled features",
        )


def scaled(
    images_NHWC: NDArray[np.uint8], values: ValueRange, *, channels: int, size: tuple[int, int] | None = None, what: str
) -> NDArray[np.float32]:
    """Pictures as float32 ``[N,channels,H,W]`` in the range ``values``, resized to ``size`` (height, width)."""
    have = images_NHWC.shape[-1]
    if have != channels and (have, channels) != (1, 3):
        raise BadInput(
            f"{what} takes {channels} channel{'s' if channels != 1 else ''}, the pictures have {have}",
            hint="use a network for such pictures",
        )
    pictures = images_NHWC.transpose(0, 3, 1, 2).astype(np.float32)
    if size is not None and pictures.shape[2:] != tuple(size):
        pictures = resized(pictures, size)
    if values == "-1:1":
        pictures = pictures / np.float32(127.5) - 1
    elif values == "0:1":
        pictures = pictures / np.float32(255)
    if have != channels:
        pictures = pictures.repeat(channels, axis=1)
    return np.ascontiguousarray(pictures)


def resized(pictures: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Float32 ``[N,C,H,W]`` to ``size`` (height, width): bicubic, with antialiasing, neither clipped nor rounded."""
    from PIL import Image

    height, width = size
    found = np.empty((*pictures.shape[:2], height, width), np.float32)
    for index in np.ndindex(*pictures.shape[:2]):
        plane = Image.fromarray(np.ascontiguousarray(pictures[index]))
        found[index] = np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC))
    return found
