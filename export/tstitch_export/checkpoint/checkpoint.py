"""Checkpoints as published: names and shapes first, tensors on demand, and never any code.

``.safetensors`` headers are read without torch. ``.pt``, ``.pth``, ``.bin`` and ``.ckpt`` go through
``torch.load(weights_only=True)``, which refuses a pickle that would run code. An index (``*.index.json``, as
transformers and diffusers write it) stands for the shards that it lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.read import VOCABULARY_BYTES, decode_json, read_json
from tstitch_engines.errors import BadCheckpoint, first_line
from tstitch_engines.needs import require
from tstitch_export.checkpoint.number_types import TYPES, check_weight_type, from_bytes, is_eight_bit_float
from tstitch_export.checkpoint.pickled import PICKLED, read_pickled
from tstitch_export.checkpoint.safetensors_file import SafetensorsEntry, read_header_and_metadata
from tstitch_export.checkpoint.wrapping import unwrap_names

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PICKLED", "SAFETENSORS", "Checkpoint", "listed_in", "read_checkpoint", "read_index"]

Numbers = NDArray[np.floating[Any]]
SAFETENSORS: Final = (".safetensors", ".sft")
_AGAIN: Final = "download or copy it again"
# What layers of 8-bit floats have beside their weight: its scale, and what only arithmetic in 8 bits needs
_SCALES: Final = (".scale_weight", ".weight_scale")
_NOTE: Final = ".comfy_quant"
_NOTE_BYTES: Final = 4096
_UNUSED: Final = (".scale_input", ".input_scale", _NOTE)
_MARKER: Final = "scaled_fp8"


class _Index(msgspec.Struct):
    weight_map: dict[str, str] = {}


class _Quantised(msgspec.Struct, forbid_unknown_fields=True):
    """What ComfyUI notes of a layer, where it is one of 8-bit floats with a scale and nothing else."""

    format: str
    full_precision_matrix_mult: bool = False


class _File(Protocol):
    """One file's tensors under their stored names. ``types`` are torch's names."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def types(self) -> Mapping[str, str]: ...

    def tensors(self) -> Mapping[str, Tensor]: ...

    def readers(self) -> Mapping[str, Callable[[], Numbers]]: ...


class Checkpoint:
    """A model's state dict by ``path``: ``shapes`` at once, ``tensors()`` when they are needed.

    The names are the model's own, without what training code put around them (``wrapping``). ``outside`` are the shapes
    of tensors that are not the model's (a trainer's buffers), ``markers`` the names of those and of empty tensors,
    ``metadata`` is that of a ``.safetensors`` file, ``beside`` the plain values of a training state around its tensors
    (``args``, ``global_step``): numbers, texts, and lists and dictionaries of them. ``notes`` say in words what was
    taken of several models. ``types`` are what the numbers are stored in, by torch's names.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[_File],
        *,
        metadata: Mapping[str, str] | None = None,
        beside: Mapping[str, object] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """``files``: one, or the shards of an index."""
        self.path = path
        self.metadata = dict(metadata or {})
        self.beside = dict(beside or {})
        self._files = tuple(files)
        stored = {key: shape for file in files for key, shape in file.shapes.items()}
        types = {key: dtype for file in files for key, dtype in file.types.items()}
        # An empty tensor holds nothing that a model could be of, whatever its other dimensions say.
        empty = {key for key, shape in stored.items() if 0 in shape}
        found = unwrap_names((key for key in stored if key not in empty), file=path.name)
        self.notes = (*notes, *found.notes)
        self.outside = {name: stored[key] for key, name in found.outside.items()}
        self.markers = frozenset((*(key.removeprefix("module.") for key in empty), *self.outside))
        shapes = {name: stored[key] for key, name in found.names.items()}
        self.types = {name: types[key] for key, name in found.names.items()}
        self._scales = _scales(path, shapes, self.types)
        beside_weights = {*self._scales.values(), *(name for name in shapes if _is_beside(name, self.types))}
        self.shapes = {name: shape for name, shape in shapes.items() if name not in beside_weights}
        self._names = {**found.outside, **found.names}
        for name in self.shapes:
            check_weight_type(path.name, name, self.types[name])
        if noted := [name for name in shapes if name.endswith(_NOTE)]:
            readers = self._readers()
            for name in noted:
                self._check_note(name, shapes[name], readers[name])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors as stored (mapped from the file where the format allows it), 8-bit floats as float16 or float32.

        Raises ``BadCheckpoint``.
        """
        stored = {
            self._names[key]: t for file in self._files for key, t in file.tensors().items() if key in self._names
        }
        return {name: _decoded(stored[name], self._scale(name, stored)) for name in self.shapes}

    def values(self, name: str) -> NDArray[np.float64]:
        """One tensor in float64, the model's or one outside; of ``.safetensors`` read without torch and the others."""
        read = self.arrays()[name] if name in self.shapes else self._readers()[name]
        return read().astype(np.float64)

    def arrays(self) -> dict[str, Callable[[], Numbers]]:
        """The tensors as functions that read one, in float32 (float64 stays); ``.safetensors`` ones without torch.

        The file is mapped, so that it may be deleted or replaced before they are read.
        """
        readers = self._readers()
        return {
            name: partial(_scaled, readers[name], readers[self._scales[name]])
            if name in self._scales
            else readers[name]
            for name in self.shapes
        }

    def _readers(self) -> dict[str, Callable[[], Numbers]]:
        found = ((key, read) for file in self._files for key, read in file.readers().items())
        return {self._names[key]: read for key, read in found if key in self._names}

    def _scale(self, name: str, stored: Mapping[str, Tensor]) -> Tensor | None:
        return stored[self._scales[name]] if name in self._scales else None

    def _check_note(self, name: str, shape: tuple[int, ...], read: Callable[[], Numbers]) -> None:
        """Raises ``BadCheckpoint`` unless ComfyUI's note ``name`` says that the layer's weight is 8-bit floats."""
        is_text = self.types[name] == "uint8" and math.prod(shape) <= _NOTE_BYTES
        text = read().astype(np.uint8).tobytes() if is_text else f"{self.types[name]} {list(shape)}".encode()
        try:
            noted = msgspec.convert(decode_json(text), _Quantised).format
        except ValueError:
            noted = text[:200].decode(errors="replace")
        if not is_eight_bit_float(noted):
            raise BadCheckpoint(
                f"{self.path.name}: {name!r} says that its layer is quantised: {noted}; allowed are float8_e4m3fn and "
                "float8_e5m2",
                hint="give the weights in float16, bfloat16 or float32",
            )


class _Safetensors:
    def __init__(self, path: Path, entries: Mapping[str, SafetensorsEntry]) -> None:
        self._path = path
        self._entries = entries
        self.shapes = {name: entry.shape for name, entry in entries.items()}
        self.types = {name: TYPES[entry.dtype] for name, entry in entries.items()}

    def tensors(self) -> Mapping[str, Tensor]:
        require("torch", f"the checkpoint {self._path.name}")
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self._path)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise BadCheckpoint(f"{self._path.name} can't be loaded: {first_line(error)}", hint=_AGAIN) from None

    def readers(self) -> Mapping[str, Callable[[], Numbers]]:
        content = np.memmap(self._path, np.uint8, "r")
        return {name: partial(self._read, content, name) for name in self._entries}

    def _read(self, content: NDArray[np.uint8], name: str) -> Numbers:
        entry = self._entries[name]
        found = from_bytes(content[entry.start : entry.start + entry.length], self.types[name], entry.shape)
        if found is None:
            raise _no_floats(self._path.name, name, self.types[name])
        return found


class _Pickled:
    def __init__(self, path: Path, stored: Mapping[str, Tensor]) -> None:
        self._path = path
        self._stored = stored
        self.shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        self.types = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in stored.items()}

    def tensors(self) -> Mapping[str, Tensor]:
        return self._stored

    def readers(self) -> Mapping[str, Callable[[], Numbers]]:
        return {name: partial(self._read, name) for name in self._stored}

    def _read(self, name: str) -> Numbers:
        import torch

        tensor = self._stored[name]
        if tensor.is_complex() or tensor.is_quantized:
            raise _no_floats(self._path.name, name, self.types[name])
        kept = tensor if tensor.dtype == torch.float64 else tensor.float()
        found: Numbers = kept.detach().numpy()
        return found


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads names and shapes, under the names that the model itself has.

    Of several state dicts in a training state, and of several models in one, a moving average is taken before the
    weights that it was made of; ``notes`` say so. Raises ``BadCheckpoint`` for a file that is missing, damaged, of
    another kind, or that carries code, and for weights that are not floats.
    """
    if not path.is_file():
        raise BadCheckpoint(
            f"checkpoint {path} does not exist" if not path.exists() else f"checkpoint {path} is not a file",
            hint="give --member NAME=CHECKPOINT a .safetensors, .pt or .pth file or a diffusers folder",
        )
    if path.name.endswith(".json") and ".index." in path.name:
        return _sharded(path)
    file, more = _open(path)
    return Checkpoint(path, [file], **more)


def _open(path: Path) -> tuple[_File, dict[str, Any]]:
    """The file, and what it says beside its tensors: keywords of ``Checkpoint``."""
    if path.suffix in SAFETENSORS:
        entries, metadata = read_header_and_metadata(path)
        return _Safetensors(path, entries), {"metadata": metadata}
    if path.suffix not in PICKLED:
        packed = path.suffix == ".gguf"
        raise BadCheckpoint(
            f"checkpoint {path.name} has the ending {path.suffix!r}; known are .safetensors, {', '.join(PICKLED)}",
            hint="its weights are quantised: give those that it was made of, in float16, bfloat16 or float32"
            if packed
            else "rename it if it is one of those formats, or give a diffusers folder",
        )
    stored = read_pickled(path)
    return _Pickled(path, stored.tensors), {"beside": stored.beside, "notes": stored.notes}


def read_index(path: Path) -> tuple[Path, ...]:
    """The files that the index ``path`` lists, all beside it. Raises ``BadCheckpoint``."""
    names = listed_in(path)
    for name in names:
        if Path(name).name != name or not (path.parent / name).is_file():
            raise BadCheckpoint(
                f"{path.name} names {name}, which is not beside it in {path.parent}",
                hint="download or copy all its files",
            )
    return tuple(path.parent / name for name in names)


def listed_in(path: Path) -> list[str]:
    """The names in the index ``path``, whether there are such files or not. Raises ``BadCheckpoint``."""
    return sorted(set(_weight_map(path).values()))


def _weight_map(path: Path) -> dict[str, str]:
    try:
        found = msgspec.convert(read_json(path, VOCABULARY_BYTES), _Index).weight_map
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} lists no files (no weight_map): {error}", hint=_AGAIN) from None
    if not found:
        raise BadCheckpoint(f"{path} lists no files (no weight_map)", hint=_AGAIN)
    return found


def _sharded(path: Path) -> Checkpoint:
    opened = [_open(part) for part in read_index(path)]
    held = {name for file, _ in opened for name in file.shapes}
    missing = [name for name in _weight_map(path) if name not in held]
    if missing:
        raise BadCheckpoint(
            f"{path.name} lists {missing[0]}, which none of its files holds (of {len(missing)} such tensors)",
            hint="download or copy the index and all its files from one model",
        )
    metadata = {key: value for _, more in opened for key, value in more.get("metadata", {}).items()}
    return Checkpoint(path, [file for file, _ in opened], metadata=metadata)


def _is_beside(name: str, types: Mapping[str, str]) -> bool:
    """Whether a tensor is none of the model's, but says how its 8-bit floats are computed with."""
    if name.rpartition(".")[2] == _MARKER:
        return True
    layer = next((name.removesuffix(end) for end in _UNUSED if name.endswith(end)), None)
    return layer is not None and f"{layer}.weight" in types


def _scales(path: Path, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> dict[str, str]:
    """Weight -> the tensor that it is multiplied with: one number, or one for each row. Raises ``BadCheckpoint``."""
    found = {}
    for name, shape in shapes.items():
        layer, dot, kind = name.rpartition(".")
        weight = f"{layer}.weight"
        if weight not in shapes or not is_eight_bit_float(types[weight]):
            continue
        if f"{dot}{kind}" not in _SCALES:
            if "scale" in kind and f"{dot}{kind}" not in _UNUSED:
                raise _unknown_scale(path, weight, name, shape, types[weight])
            continue
        if shape not in ((), (1,) * len(shape)) and (
            shape[0] != shapes[weight][0] or any(side != 1 for side in shape[1:])
        ):
            raise _unknown_scale(path, weight, name, shape, types[weight])
        found[weight] = name
    return found


def _unknown_scale(path: Path, weight: str, scale: str, shape: tuple[int, ...], dtype: str) -> BadCheckpoint:
    return BadCheckpoint(
        f"{path.name}: {weight!r} is stored as {dtype} and {scale!r} of shape {list(shape)}; allowed is one scale "
        "(scale_weight or weight_scale), or one for each row",
        hint="give the weights in float16, bfloat16 or float32",
    )


def _decoded(tensor: Tensor, scale: Tensor | None) -> Tensor:
    """8-bit floats, which have hardly an operation, as float16, which has all their numbers; in float32 when scaled."""
    import torch

    if not is_eight_bit_float(str(tensor.dtype).removeprefix("torch.")):
        return tensor
    if scale is None:
        return tensor.to(torch.float16)
    return tensor.float() * scale.float().reshape(-1, *(1,) * (tensor.ndim - 1))


def _scaled(read: Callable[[], Numbers], scale: Callable[[], Numbers]) -> Numbers:
    value = read()
    return value * scale().reshape(-1, *(1,) * (value.ndim - 1)).astype(value.dtype)


def _no_floats(file: str, name: str, dtype: str) -> BadCheckpoint:
    return BadCheckpoint(
        f"{file}: {name[:200]!r} is stored as {dtype}; wanted are real numbers of 8 bits or more",
        hint="save it in float32",
    )
