"""Pickled checkpoints: read without running anything, and the state dict in a training state found."""

from __future__ import annotations

import pickle
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tstitch_engines.bundle.read import open_regular
from tstitch_engines.errors import BadCheckpoint
from tstitch_engines.needs import require
from tstitch_engines.quiet import silence_output
from tstitch_export.checkpoint.safetensors_file import recognise, shown
from tstitch_export.checkpoint.stand_ins import STAND_INS, Kept
from tstitch_export.checkpoint.wrapping import AVERAGES

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PICKLED", "StateDict", "read_pickled"]

PICKLED: Final = (".pt", ".pth", ".bin", ".ckpt")
_AVERAGES: Final = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "model_ema_state_dict",
                    "params_ema", "module_ema", "nnet_ema", "unet_ema", "ema_unet", "ema_params")  # fmt: skip
_MODELS: Final = ("model", "module", "state_dict", "model_state_dict", "params", "net", "nnet", "unet", "network",
                  "string_to_param")  # of a textual inversion  # fmt: skip
_LEVELS: Final = 4  # {"state": {"ema": {"module": {...}}}} and the like
_LISTS: Final = ("shadow_params", "collected_params")
_MOST_BESIDE: Final = 100_000  # values of a training state that are looked at
_SAFETENSORS_HINT: Final = (
    "convert it to .safetensors where you trust it: safetensors.torch.save_file(state_dict, path)"
)


class StateDict(NamedTuple):
    """``beside``: the plain values of a training state. ``notes``: what was taken of several, in words."""

    tensors: Mapping[str, Tensor]
    beside: Mapping[str, object]
    notes: tuple[str, ...]


def read_pickled(path: Path) -> StateDict:
    """The state dict in a training state: under a moving average's key where there is one, else under a model's.

    Raises ``BadCheckpoint`` for a file that is damaged, holds none, or would run code.
    """
    data, beside, notes = _load(path), dict[str, object](), list[str]()
    for _ in range(_LEVELS):
        if not isinstance(data, Mapping):
            break
        _add_plain(data, beside)
        held = [key for key in (*_AVERAGES, *_MODELS) if isinstance(data.get(key), Mapping) and _named(data[key])]
        if not held and not _named(data):
            held = [key for key, value in data.items() if isinstance(value, Mapping) and _named(value, matrices=True)]
            if len(held) != 1:
                break
        if not held:
            break
        if held[0] in _AVERAGES and len(held) > 1:
            notes.append(f"of its state dicts {held[0]!r} is taken, not {', '.join(held[1:])}, since {AVERAGES}")
        elif nameless := next(
            (key for key in _AVERAGES if isinstance(data.get(key), Mapping) and _listed(data[key])), ""
        ):
            notes.append(
                f"{held[0]!r} is taken; the moving average {nameless!r} has no names ({_listed(data[nameless])})"
            )
        data = data[held[0]]
    tensors = _tensors(path, data)
    for name, tensor in tensors.items():
        _check_whole(path, name, tensor)
    return StateDict(tensors, beside, tuple(notes))


def _named(data: Mapping[Any, object], depth: int = _LEVELS, *, matrices: bool = False) -> bool:
    """Whether a state dict is in it, at once or under a key that may hold one; ``matrices``: not only vectors."""
    from torch import Tensor

    if any(isinstance(value, Tensor) and value.ndim > int(matrices) for value in data.values()):
        return True
    nested = (data.get(key) for key in (*_AVERAGES, *_MODELS))
    return depth > 1 and any(isinstance(value, Mapping) and _named(value, depth - 1) for value in nested)


def _listed(data: Mapping[Any, object]) -> str:
    return next((key for key in _LISTS if isinstance(data.get(key), list)), "")


def _tensors(path: Path, data: object) -> dict[str, Tensor]:
    import torch

    found = {}
    if isinstance(data, Mapping):
        for key, value in data.items():
            if isinstance(key, str | int) and isinstance(value, torch.Tensor):
                found[str(key)] = value
            elif isinstance(key, str) and key.endswith(".alpha") and isinstance(value, int | float):
                found[key] = torch.tensor(float(value))  # of a LoRA
            elif isinstance(key, str) and key.endswith(".alpha") and value is not None:
                raise BadCheckpoint(
                    f"{path.name}: {shown(key)} is a {type(value).__name__}, and the alpha of a LoRA is a number",
                    hint="save it as a tensor or a number",
                )
    if found and not any(tensor.numel() for tensor in found.values()):
        raise BadCheckpoint(
            f"{path.name} holds {len(found)} tensors, all of them empty, as ZeRO stage 3 leaves them: the weights are "
            "in the files of the optimizer",
            hint="put them together with DeepSpeed's zero_to_fp32.py, and give what it writes",
        )
    if found:
        return found
    places = [data, *(data.get(key) for key in _AVERAGES)] if isinstance(data, Mapping) else []
    listed = next((name for place in places if isinstance(place, Mapping) and (name := _listed(place))), "")
    keys = [str(key)[:80] for key in data if isinstance(key, str | int)] if isinstance(data, Mapping) else []
    held = ", ".join(keys[:5]) or f"a {type(data).__name__}"
    if listed or (isinstance(data, list) and any(isinstance(value, torch.Tensor) for value in data)):
        raise BadCheckpoint(
            f"{path.name} holds its tensors as a list without names"
            f"{f' ({listed} of a moving average)' if listed else ''}, so nothing says which is which",
            hint="copy the average into the model with the training's own code, and save model.state_dict()",
        )
    raise BadCheckpoint(
        f"{path.name} holds no state dict: no tensors at the top or under {', '.join((*_AVERAGES[:3], *_MODELS))}; "
        f"it has: {held}",
        hint=f"save the model's own state dict; {_SAFETENSORS_HINT}",
    )


def _load(path: Path) -> object:
    torch = require("torch", f"the checkpoint {path.name} (only .safetensors can be inspected without)")
    kind = recognise(path)
    if kind is not None:
        raise BadCheckpoint(f"{path.name} is not a PyTorch checkpoint: {kind}", hint="download or copy it again")
    allowed = torch.serialization.safe_globals(STAND_INS)
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
            problem = (
                "is damaged, holds more than tensors, or is pickled in another protocol than torch.save's own; it was "
                "not loaded"
            )
        raise BadCheckpoint(f"{path.name} {problem}", hint=_SAFETENSORS_HINT) from None
    except Exception as error:  # whatever torch's reader makes of bytes that are no pickle of its kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadCheckpoint(f"{path.name} is damaged: {reason}", hint="download or copy it again") from None


def _check_whole(path: Path, name: str, tensor: Tensor) -> None:
    """Raises ``BadCheckpoint`` for a tensor that is larger than the memory that it shows: sparse, or repeated."""
    import torch

    held = tensor.untyped_storage().nbytes() if tensor.layout == torch.strided and tensor.device.type == "cpu" else -1
    if held < tensor.numel() * tensor.element_size():
        raise BadCheckpoint(
            f"{path.name}: {shown(name)} is {'x'.join(map(str, tensor.shape))} of {tensor.dtype}, and the file does "
            "not hold that many numbers",
            hint="save it with tensor.contiguous()",
        )


def _add_plain(data: Mapping[Any, object], beside: dict[str, object]) -> None:
    from torch import Tensor

    left = iter(range(_MOST_BESIDE))  # a pickle of a few lines may hold a list of itself, thousands of times
    for key, value in data.items():
        if isinstance(value, Tensor) and value.shape == (0,):  # a marker, as files of tensors alone have them
            beside.setdefault(str(key), True)
        elif (plain := _plain_value(value, left)) is not None:
            beside.setdefault(str(key), plain)


def _plain_value(value: object, left: Iterator[int], depth: int = 8) -> object:
    """A number or text, or the ones in a list, dictionary or namespace; ``None`` where there are none."""
    if next(left, None) is None:
        return None
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Namespace):
        value = vars(value)
    elif isinstance(value, Kept):
        value = value.held
        if isinstance(value, bool | int | float | str):
            return value
    if depth == 0 or not isinstance(value, Mapping | list | tuple):
        return None
    if not isinstance(value, Mapping):
        return [plain for item in value if (plain := _plain_value(item, left, depth - 1)) is not None] or None
    items = ((str(key), _plain_value(item, left, depth - 1)) for key, item in value.items())
    return {key: plain for key, plain in items if plain is not None} or None
