"""LoRAs put into loaded engines and taken out again, while the bundle on disk stays as it is.

The weights as they were exported lie in the bundle's ONNX files (``tstitch_engines.bundle.weights``). Each swap starts
from those, so that nothing adds up: W + sum of weight * alpha / rank * up @ down in float32 (arXiv 2106.09685), rounded
once to the engine's type. A LoRA that was fused when the bundle was built is part of W and stays.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.backends.base import Engine
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.weights import Weights, open_weights
from tstitch_engines.checks import check_number, check_path, check_text, read_items, read_pair
from tstitch_engines.errors import BadBundle, BadCheckpoint, BadInput, FailedWork, unknown_name
from tstitch_engines.host_call import from_storage, to_storage

if TYPE_CHECKING:
    from tstitch_export.families.base import LoraUse

__all__ = ["LoraFiles", "Loras", "local_loras"]

_log = logging.getLogger(__name__)

_MOST_LORAS: Final = 1000  # in one network
LoraFiles = str | Path | Sequence[str | Path | tuple[str | Path, float]]
_EXAMPLE: Final = "style.safetensors:0.8"
_ALLOWED: Final = {"allowed": "are a text, a path, and a list of paths and (path, weight)", "example": f'"{_EXAMPLE}"'}
Delta = Callable[[], NDArray[np.float32]]


@dataclass(frozen=True)
class _Active:
    """The LoRAs in one engine: ``said`` as in manifests, ``deltas`` by weight."""

    said: str = ""
    deltas: Mapping[str, Sequence[Delta]] = field(default_factory=dict)


_NONE: Final = _Active()
_LARGEST: Final = {"float16": 65504.0}


class Loras:
    """The LoRAs in each engine. ``changed`` gets the name of an engine whose recorded steps are no longer valid.

    Files are mapped, not read into memory. One weight at a time is computed, when the engine takes it.
    """

    def __init__(
        self, bundle: Bundle, backend: str, engines: Mapping[str, Engine], changed: Callable[[str], None]
    ) -> None:
        self._bundle = bundle
        self._backend = backend
        self._engines = dict(engines)
        self._changed = changed
        self._weights: dict[str, Weights] = {}
        self._active: dict[str, _Active] = {}
        self._lost: dict[str, tuple[str, tuple[str, ...]]] = {}  # why, and the weights that may be anything

    def to_dict(self) -> dict[str, str]:
        """The LoRAs in use by network: ``{"large": "style.safetensors:0.8"}``."""
        return {name: active.said for name, active in self._active.copy().items() if active.said}

    def check(self) -> None:
        """Raises ``FailedWork`` where an engine's weights are not known, after a swap and its undoing both failed."""
        for name, (why, _) in self._lost.items():
            raise FailedWork(
                f"the weights of {name!r} are not known since a LoRA could not be put in: {why}",
                hint=f"call restore({name!r}), or close the runtime and load the bundle again",
            )

    def current(self, name: str) -> _Active:
        """The state of a network, for ``put``."""
        return self._active.get(name, _NONE)

    def swap(self, name: str, files: LoraFiles) -> None:
        """Puts these LoRAs into a network, in place of those that are there. See ``Runtime.swap_lora``."""
        self.put(name, self._read(name, files))

    def put(self, name: str, wanted: _Active) -> None:
        """Puts a network into a state that ``current`` returned. Engine and record agree afterwards, also when this
        raises."""
        engine, before = self._refittable(name), self.current(name)
        _, lost = self._lost.get(name, ("", ()))
        keys = [*dict.fromkeys((*wanted.deltas, *before.deltas, *lost))]
        if keys:
            self._refit(name, engine, keys, wanted, before)
        self._lost.pop(name, None)
        self._active.pop(name, None)
        if wanted.said:
            self._active[name] = wanted

    def restore(self, name: str | None = None) -> None:
        """Gives one network, or all that have LoRAs, the weights that were exported."""
        if name is not None:
            self._refittable(name)
        for each in dict.fromkeys((*self._active, *self._lost)):
            if name in (None, each):
                self.put(each, _NONE)

    # --- how

    def _read(self, name: str, files: LoraFiles) -> _Active:
        from tstitch_export.families.base import LoraTarget
        from tstitch_export.families.lora.fuse import describe_loras, lora_deltas

        uses = _uses(files)
        if not uses:
            raise BadInput(
                f"no LoRA is given for {name!r}",
                hint=f'e.g. swap_lora({name!r}, "style.safetensors:0.8"), or restore({name!r}) to take it out',
            )
        self._refittable(name)
        weights = self._open(name).map
        shapes = {key: weight.shape for key, weight in weights.weights.items()}
        target = LoraTarget(part=weights.part, shapes=shapes, aliases=weights.aliases)
        found: dict[str, list[Delta]] = {}
        for use in uses:
            deltas = lora_deltas(use, target, model=f"{name} of {self._bundle.root.name}")
            _log.log(
                logging.INFO if deltas else logging.WARNING,
                *("%s: %d layers for the %s %s", use.path.name, len(deltas), weights.part.replace("_", " "), name),
            )
            for key, delta in deltas:
                if weights.weights[key].parameter is not None:  # text encoders leave out layers that nothing reads
                    found.setdefault(key, []).append(delta)
        return _Active(describe_loras(uses), found)

    def _refittable(self, name: str) -> Engine:
        engine = self._engines.get(name)
        if engine is None:
            raise unknown_name("network", name, self._engines)
        if engine.refit_names is None:
            why, hint = engine.refit_obstacle
            raise BadInput(f"{name!r} runs on {self._backend} and can't be given a LoRA now: {why}", hint=hint)
        return engine

    def _open(self, name: str) -> Weights:
        if name not in self._weights:
            self._weights[name] = open_weights(self._bundle, name, self._bundle.manifest.networks()[name])
        return self._weights[name]

    def _refit(self, name: str, engine: Engine, keys: Sequence[str], wanted: _Active, before: _Active) -> None:
        weights = self._open(name)
        values = _replacements(name, weights, engine, keys, wanted)
        others = _Lazy({key: partial(weights.read, key) for key in weights.map.initialisers})
        if not engine.refit_keeps_recordings:
            self._changed(name)
        try:
            engine.refit(values, others)
        except BaseException:
            try:
                engine.refit(_replacements(name, weights, engine, keys, before), others)
            except Exception as second:
                why = (str(second).splitlines() or [type(second).__name__])[0]
                self._lost[name] = (why, tuple(keys))
                _log.error("%s: its weights are not known any more: %s", name, why)
            raise


class _Lazy(Mapping[str, NDArray[Any]]):
    """Weights by name, each computed when it is asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], NDArray[Any]]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _replacements(name: str, weights: Weights, engine: Engine, keys: Sequence[str], active: _Active) -> _Lazy:
    """The weights ``keys`` with the LoRAs ``active``, by the engine's names and in its layout and type.

    Raises ``BadBundle`` for a weight that the map says can't be had or replaced.
    """
    makers: dict[str, Callable[[], NDArray[Any]]] = {}
    for key in keys:
        weight = weights.map.weights[key]
        inside = weight.parameter if engine.refit_names == "parameter" else weight.initialiser
        shared = weight.shared and engine.refit_names == "initialiser"
        if weight.initialiser is None or inside is None or shared:
            raise BadBundle(
                f"{key} of {name!r} {'shares its place in the graph' if shared else 'was folded into the graph'} "
                "and can't be replaced",
                hint=f"build with the LoRA fused: tstitch-trt build ... --lora {name}=FILE",
            )
        makers[inside] = partial(_replacement, weights, key, inside, active.deltas.get(key, ()))
    return _Lazy(makers)


def _replacement(weights: Weights, key: str, inside: str, deltas: Sequence[Delta]) -> NDArray[Any]:
    weight = weights.map.weights[key]
    assert weight.initialiser is not None
    dtype = weights.map.initialisers[weight.initialiser].dtype
    stored = weights.read(weight.initialiser)
    value = stored.T if weight.transposed else stored
    if deltas:
        total = from_storage(np.ascontiguousarray(value), dtype).astype(np.float32)
        for delta in deltas:
            total = total + delta()
        if not np.abs(total).max() <= _LARGEST.get(dtype, np.finfo(np.float32).max):  # NaN is not either
            raise BadCheckpoint(
                f"with these LoRAs {key} holds NaN, infinity or what {dtype} can't hold",
                hint="give them less weight, e.g. FILE:0.5",
            )
        value = to_storage(total, dtype)
    # An engine takes it as it has it: the graph transposed, the program as the checkpoint.
    flip = weight.transposed and inside == weight.initialiser and inside != weight.parameter
    return np.array(value.T if flip else value, order="C")


def local_loras(files: LoraFiles) -> LoraFiles:
    """``files`` with paths in place of Hugging Face repositories, which may be downloaded: nobody should wait for it.

    Raises ``BadInput`` and what ``Checkpoints.locate`` does.
    """
    from tstitch_export.families.lora.fuse import locate_loras
    from tstitch_export.hub.checkpoints import Checkpoints

    checkpoints = Checkpoints()
    found: list[Any] = _items(files)
    return [locate_loras(item, checkpoints) if isinstance(item, str) else item for item in found]


def _items(files: LoraFiles) -> list[object]:
    items = [files] if isinstance(files, str | os.PathLike) else read_items(files, "files", _MOST_LORAS, **_ALLOWED)
    return [check_text(item, "files", example=_EXAMPLE) if isinstance(item, str) else item for item in items]


def _uses(files: LoraFiles) -> tuple[LoraUse, ...]:
    """Raises ``BadInput`` for what names no file, a file that is not there and a weight that is no number."""
    from tstitch_export.families.base import LoraUse
    from tstitch_export.families.lora.fuse import parse_loras

    found: list[LoraUse] = []
    for item in _items(files):
        if isinstance(item, str):
            found += parse_loras(item)
        else:
            path, weight = read_pair(item, "files", **_ALLOWED) if isinstance(item, tuple) else (item, 1.0)
            found.append(LoraUse(check_path(path, "files"), check_number(weight, "a weight of files")))
    for use in found:
        if not check_path(use.path, "files").is_file():
            raise BadInput(f"the LoRA {use.path} does not exist", hint="give the path of a .safetensors file")
    return tuple(found)
