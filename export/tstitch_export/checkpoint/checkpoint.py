"""Checkpoints as published: names and shapes first, tensors on demand, and never any code.

``.safetensors`` headers are read without torch. ``.pt``, ``.pth``, ``.bin`` and ``.ckpt`` go through
``torch.load(weights_only=True)``, which refuses a pickle that would run code. An index (``*.index.json``, as
transformers and diffusers write it) stands for the shards that it lists.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.read import VOCABULARY_BYTES, decode_json, open_regular, read_json
from tstitch_engines.errors import BadCheckpoint, first_line
from tstitch_engines.needs import require
from tstitch_engines.quiet import silence_output

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "PICKLED",
    "Checkpoint",
    "SafetensorsEntry",
    "read_checkpoint",
    "read_index",
    "read_safetensors_header",
    "read_safetensors_metadata",
]

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_NESTED = ("ema", "model", "state_dict")  # in this order: published DiT training states hold both ema and model
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # safetensors' names -> numpy's, of the bits
_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F16": 16,
    "BF16": 16,
}
_BITS |= {"F32": 32, "F64": 64, "C64": 64, **{f"{sign}{n}": n for sign in "IU" for n in (8, 16, 32, 64)}}
_MOST_BESIDE = 100_000  # values of a training state that are looked at
_HEADER_BYTES = 16 << 20  # those of the largest models have one
_SAFETENSORS_HINT = "convert it to .safetensors where you trust it: safetensors.torch.save_file(state_dict, path)"


class SafetensorsEntry(NamedTuple):
    dtype: str  # as the format spells it: F32, F16, BF16, I64...
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    length: int


_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]


class _Index(msgspec.Struct):
    weight_map: dict[str, str] = {}


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=16)]
    data_offsets: tuple[_Size, _Size]


class Checkpoint:
    """A state dict by ``path``: ``shapes`` at once, ``tensors()`` when they are needed.

    ``markers`` are the names of empty tensors, ``metadata`` is that of a ``.safetensors`` file, ``beside`` the plain
    values of a training state around its tensors (``args``, ``global_step``): numbers, texts, and lists and
    dictionaries of them.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        stored: Mapping[str, Tensor] | None,
        shards: Sequence[Checkpoint] = (),
        *,
        metadata: Mapping[str, str] | None = None,
        beside: Mapping[str, object] | None = None,
    ) -> None:
        """``shards``: the files that hold its tensors, where it is an index."""
        self.path = path
        self.metadata = dict(metadata or {})
        self.beside = dict(beside or {})
        self.markers = frozenset(name for name, shape in shapes.items() if 0 in shape)
        # An empty tensor holds nothing that a model could be of, whatever its other dimensions say.
        self.shapes = {name: shape for name, shape in shapes.items() if 0 not in shape}
        self._stored = stored
        self._shards = tuple(shards)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors as stored (mapped from the file where the format allows it)."""
        if self._shards:
            return {name: tensor for shard in self._shards for name, tensor in shard.tensors().items()}
        if self._stored is not None:
            return dict(self._stored)
        require("torch", f"the checkpoint {self.path.name}")
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return {_plain(name): tensor for name, tensor in load_file(self.path).items()}
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise BadCheckpoint(
                f"{self.path.name} can't be loaded: {first_line(error)}", hint="download or copy it again"
            ) from None

    def values(self, name: str) -> NDArray[np.float64]:
        """One small tensor of ordinary floats; of a ``.safetensors`` file read without torch."""
        return self.arrays()[name]().astype(np.float64)

    def arrays(self) -> dict[str, Callable[[], NDArray[np.floating[Any]]]]:
        """The tensors as functions that read one, in float32 (float64 stays); ``.safetensors`` ones without torch.

        The file is mapped, so that it may be deleted or replaced before they are read.
        """
        if self._shards:
            return {name: read for shard in self._shards for name, read in shard.arrays().items()}
        if self._stored is None:
            entries = {_plain(key): entry for key, entry in read_safetensors_header(self.path).items()}
            if all(entry.dtype in _FLOATS for entry in entries.values()):
                content = np.memmap(self.path, np.uint8, "r")
                return {name: partial(_floats, content, entry) for name, entry in entries.items()}
        return {name: partial(_to_numpy, tensor) for name, tensor in self.tensors().items()}


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads names and shapes. A dict nested under ``ema``, ``model`` or ``state_dict`` is unwrapped and the ``module.``
    of data-parallel training is dropped. Raises ``BadCheckpoint`` for a file that is missing, damaged, of another
    kind, or that carries code.
    """
    if not path.is_file():
        raise BadCheckpoint(
            f"checkpoint {path} does not exist" if not path.exists() else f"checkpoint {path} is not a file",
            hint="give --member NAME=CHECKPOINT a .safetensors, .pt or .pth file or a diffusers folder",
        )
    if path.name.endswith(".json") and ".index." in path.name:
        return _sharded(path)
    if path.suffix == ".safetensors":
        entries, metadata = _safetensors(path)
        shapes = {_plain(name): entry.shape for name, entry in entries.items()}
        return Checkpoint(path, shapes, None, metadata=metadata)
    if path.suffix not in PICKLED:
        raise BadCheckpoint(
            f"checkpoint {path.name} has the ending {path.suffix!r}; known are .safetensors, {', '.join(PICKLED)}",
            hint="rename it if it is one of those formats, or give a diffusers folder",
        )
    beside: dict[str, object] = {}
    stored = _unwrap(path, _load_pickled(path), beside)
    return Checkpoint(path, {name: tuple(tensor.shape) for name, tensor in stored.items()}, stored, beside=beside)


def read_index(path: Path) -> tuple[Path, ...]:
    """The files that the index ``path`` lists, all beside it. Raises ``BadCheckpoint``."""
    names = sorted(set(_weight_map(path).values()))
    for name in names:
        if Path(name).name != name or not (path.parent / name).is_file():
            raise BadCheckpoint(
                f"{path.name} names {name}, which is not beside it in {path.parent}",
                hint="download or copy all its files",
            )
    return tuple(path.parent / name for name in names)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        found = msgspec.convert(read_json(path, VOCABULARY_BYTES), _Index).weight_map
    except (OSError, ValueError) as error:
        raise BadCheckpoint(
            f"{path} lists no files (no weight_map): {error}", hint="download or copy it again"
        ) from None
    if not found:
        raise BadCheckpoint(f"{path} lists no files (no weight_map)", hint="download or copy it again")
    return found


def _sharded(path: Path) -> Checkpoint:
    shards = [read_checkpoint(part) for part in read_index(path)]
    shapes = {name: shape for shard in shards for name, shape in shard.shapes.items()}
    shapes |= {name: (0,) for shard in shards for name in shard.markers}
    missing = [name for name in map(_plain, _weight_map(path)) if name not in shapes]
    if missing:
        raise BadCheckpoint(
            f"{path.name} lists {missing[0]}, which none of its files holds (of {len(missing)} such tensors)",
            hint="download or copy the index and all its files from one model",
        )
    metadata = {key: value for shard in shards for key, value in shard.metadata.items()}
    return Checkpoint(path, shapes, None, shards, metadata=metadata)


def read_safetensors_header(path: Path) -> dict[str, SafetensorsEntry]:
    """The tensors of a ``.safetensors`` file and where their bytes lie. Raises ``BadCheckpoint`` when it is damaged.

    The rules are the format's: the tensors' bytes follow each other without a hole, each as many as its shape and type
    need, to the end of the file.
    """
    return _safetensors(path)[0]


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """What the writer of a ``.safetensors`` file noted beside the tensors. Raises ``BadCheckpoint``."""
    return _safetensors(path)[1]


def _safetensors(path: Path) -> tuple[dict[str, SafetensorsEntry], dict[str, str]]:
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, _HEADER_BYTES):
                raise ValueError(f"its header would be {length:,} bytes of {size:,}; allowed are {_HEADER_BYTES:,}")
            header = decode_json(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        noted = header.pop("__metadata__", None)
        metadata = msgspec.convert({} if noted is None else noted, dict[str, str])
        entries = {name: _entry(name, value, 8 + length) for name, value in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].length)):
            if entry.start != end:
                raise ValueError(f"{_shown(name)} begins at byte {entry.start:,}, where the one before ends at {end:,}")
            end += entry.length
        if end != size:
            raise ValueError(f"it has {size:,} bytes, its header promises {end:,}")
    except (OSError, ValueError) as error:
        raise BadCheckpoint(
            f"{path.name} is not a whole safetensors file: {_guess(path) or error}", hint="download or copy it again"
        ) from None
    return entries, metadata


def _entry(name: str, value: object, base: int) -> SafetensorsEntry:
    try:
        entry = msgspec.convert(value, _Entry)
    except msgspec.ValidationError as error:
        raise ValueError(f"the entry of {_shown(name)} is wrong: {error}") from None
    begin, end = entry.data_offsets
    if (bits := _BITS.get(entry.dtype)) is None:
        raise ValueError(f"{_shown(name)} is of the unknown type {_shown(entry.dtype)}")
    if end - begin != (needs := math.prod(entry.shape) * bits // 8):
        shape = "x".join(map(str, entry.shape)) or "1"
        raise ValueError(f"{_shown(name)} is {entry.dtype} {shape}, {needs:,} bytes, and has {end - begin:,}")
    return SafetensorsEntry(entry.dtype, entry.shape, base + begin, end - begin)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def _floats(content: NDArray[np.uint8], entry: SafetensorsEntry) -> NDArray[np.floating[Any]]:
    bits = content[entry.start : entry.start + entry.length].view(_FLOATS[entry.dtype]).reshape(entry.shape)
    if entry.dtype == "BF16":  # the upper half of a float32
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float64 if entry.dtype == "F64" else np.float32)


def _to_numpy(tensor: Tensor) -> NDArray[np.floating[Any]]:
    import torch

    kept = tensor if tensor.dtype == torch.float64 else tensor.float()
    found: NDArray[np.floating[Any]] = kept.numpy()
    return found


def _plain(name: str) -> str:
    return name.removeprefix("module.")


def _load_pickled(path: Path) -> object:
    torch = require("torch", f"the checkpoint {path.name} (only .safetensors can be inspected without)")
    kind = _guess(path)
    if kind is not None:
        raise BadCheckpoint(f"{path.name} is not a PyTorch checkpoint: {kind}", hint="download or copy it again")
    # The published DiT training states hold their command line as a Namespace, which is data and runs nothing.
    allowed = torch.serialization.safe_globals([argparse.Namespace])
    try:
        with open_regular(path) as stream:
            zipped = stream.read(2) == b"PK"
        with allowed, silence_output():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|function|class) ([\w.]+)", str(error))
        if found:
            problem = f"holds more than tensors and was not loaded, since that could run code: it names {found[1]}"
        else:
            problem = "is damaged, or holds more than tensors; it was not loaded"
        raise BadCheckpoint(f"{path.name} {problem}", hint=_SAFETENSORS_HINT) from None
    except (RuntimeError, EOFError, KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadCheckpoint(f"{path.name} is damaged: {reason}", hint="download or copy it again") from None


def _unwrap(path: Path, data: object, beside: dict[str, object]) -> dict[str, Tensor]:
    """The state dict in ``data``; the plain values on the way to it are added to ``beside``, the outer ones first."""
    from torch import Tensor

    for _ in range(2):  # {"ema": {...}}, and the same once more inside
        if not isinstance(data, Mapping):
            break
        _add_plain(data, beside)
        nested = next((data[key] for key in _NESTED if isinstance(data.get(key), Mapping)), None)
        if nested is None:
            break
        data = nested
    tensors = {_plain(str(k)): v for k, v in data.items() if isinstance(v, Tensor)} if isinstance(data, Mapping) else {}
    if not tensors:
        held = ", ".join(map(str, list(data)[:5])) if isinstance(data, Mapping) else type(data).__name__
        raise BadCheckpoint(
            f"{path.name} holds no state dict: no tensors at the top or under {', '.join(_NESTED)}; it has: {held}",
            hint=f"save the model's own state dict; {_SAFETENSORS_HINT}",
        )
    for name, tensor in tensors.items():
        _check_whole(path, name, tensor)
    return tensors


def _add_plain(data: Mapping[Any, object], beside: dict[str, object]) -> None:
    left = iter(range(_MOST_BESIDE))  # a pickle of a few lines may hold a list of itself, thousands of times
    for key, value in data.items():
        if (plain := _plain_value(value, left)) is not None:
            beside.setdefault(str(key), plain)


def _plain_value(value: object, left: Iterator[int], depth: int = 4) -> object:
    """A number or text, or the ones in a list, dictionary or namespace; ``None`` where there are none."""
    if next(left, None) is None:
        return None
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if depth == 0 or not isinstance(value, Mapping | list | tuple):
        return None
    if not isinstance(value, Mapping):
        return [plain for item in value if (plain := _plain_value(item, left, depth - 1)) is not None] or None
    items = ((str(key), _plain_value(item, left, depth - 1)) for key, item in value.items())
    return {key: plain for key, plain in items if plain is not None} or None


def _check_whole(path: Path, name: str, tensor: Tensor) -> None:
    """Raises ``BadCheckpoint`` for a tensor that is larger than the memory that it shows: sparse, or repeated."""
    import torch

    held = tensor.untyped_storage().nbytes() if tensor.layout == torch.strided and tensor.device.type == "cpu" else -1
    if held < tensor.numel() * tensor.element_size():
        raise BadCheckpoint(
            f"{path.name}: {_shown(name)} is {'x'.join(map(str, tensor.shape))} of {tensor.dtype}, and the file does "
            "not hold that many numbers",
            hint="save it with tensor.contiguous()",
        )


def _guess(path: Path) -> str | None:
    """What a file is that should have been tensors, where its first bytes tell."""
    try:
        with open_regular(path) as stream:
            head = stream.read(64)
    except OSError:
        return None
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, the weights themselves were not downloaded (git lfs pull)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is an HTML page, probably the answer of a download that failed"
    return None
