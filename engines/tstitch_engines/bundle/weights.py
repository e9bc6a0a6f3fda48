"""Where the weights of a network are in its ONNX files, and the names an engine knows them by.

Tracers rename and transpose a checkpoint's weights. With this map an engine can be given others (``Engine.refit``), and
the original ones can be read from the ONNX without a library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.decode import DecodeError, convert
from tstitch_engines.bundle.manifest import Bytes, Name, Network
from tstitch_engines.bundle.read import VOCABULARY_BYTES, read_json
from tstitch_engines.errors import BadBundle, Unavailable
from tstitch_engines.spec import DTYPES, storage_dtype

__all__ = ["WEIGHTS", "Stored", "Weight", "WeightMap", "Weights", "open_weights"]

WEIGHTS: Final = "weights"  # the key in Network.files


Shape = Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, le=1 << 32)], ...], msgspec.Meta(max_length=8)]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    pass


class Stored(_Record, frozen=True):
    """The bytes of an initialiser: little-endian, from ``offset`` on in ``file``, which is one of ``Network.onnx``."""

    file: Name
    offset: Bytes
    dtype: Name
    shape: Shape


class Weight(_Record, frozen=True):
    """One weight of the checkpoint, of ``shape`` there.

    ``parameter``: its name in the exported program; ``None`` where the model leaves it out. ``initialiser``: that of
    the graph with its values, ``transposed`` or not, if any. ``shared``: other weights use it too, so it can't be
    replaced.
    """

    shape: Shape
    parameter: str | None = None
    initialiser: str | None = None
    transposed: bool = False
    shared: bool = False


class WeightMap(_Record, frozen=True):
    """``part`` of the pipeline that the network is; ``weights`` by their keys in the checkpoint's state dict.

    ``aliases``: other spellings of the module names, as files may have them. ``initialisers``: all of the graph.
    """

    part: str
    weights: dict[str, Weight]
    initialisers: dict[str, Stored]
    aliases: dict[str, str] = {}


class Weights:
    """The map of one network of a bundle, and the values as they were exported."""

    def __init__(self, found: WeightMap, files: Mapping[str, Path]) -> None:
        self.map = found
        self._files = dict(files)
        self._open: dict[str, NDArray[np.uint8]] = {}

    def read(self, initialiser: str) -> NDArray[Any]:
        """An initialiser as the graph has it, in its own type (bfloat16 as its bits). Raises ``BadBundle``."""
        stored = self.map.initialisers[initialiser]
        if stored.dtype not in DTYPES:
            raise BadBundle(
                f"the weight map says that {initialiser} is {stored.dtype}; known are {', '.join(DTYPES)}",
                hint="build the bundle again",
            )
        kind = storage_dtype(stored.dtype)
        nbytes = math.prod(stored.shape) * kind.itemsize
        if stored.file not in self._open:
            if stored.file not in self._files:
                raise BadBundle(
                    f"the weight map names {stored.file}, the network has {', '.join(self._files)}",
                    hint="build the bundle again",
                )
            self._open[stored.file] = np.memmap(self._files[stored.file], np.uint8, "r")
        content = self._open[stored.file][stored.offset : stored.offset + nbytes]
        if len(content) != nbytes:
            raise BadBundle(
                f"{initialiser} would be {nbytes} bytes at {stored.offset} of {stored.file}, which is shorter",
                hint="build the bundle again",
            )
        return np.asarray(content).view(kind).reshape(stored.shape)


def open_weights(bundle: Bundle, name: str, network: Network) -> Weights:
    """The weights of the network ``name``. Raises ``Unavailable`` where the bundle has no map of them."""
    component = network.files.get(WEIGHTS)
    if component is None:
        raise Unavailable(
            f"{bundle.root.name} has no map of the weights of {name!r} ({network.family}, {network.precision}); UNets "
            "and CLIP text encoders have one, unless they are quantised or of an older bundle",
            hint=f"build the bundle again, or with the LoRA fused: tstitch-trt build ... --lora {name}=FILE",
        )
    try:
        found = convert(read_json(bundle.path(component), VOCABULARY_BYTES), WeightMap, word="field")
        named = {weight.initialiser for weight in found.weights.values()} - {None}
        if unknown := named - found.initialisers.keys():
            raise DecodeError(f"weights are in {sorted(map(str, unknown))[0]}, which is not among the initialisers", "")
    except (DecodeError, OSError) as error:
        raise BadBundle(f"{component.path} is damaged: {error}", hint="build the bundle again") from None
    return Weights(found, {Path(part.path).name: bundle.path(part) for part in network.onnx})
