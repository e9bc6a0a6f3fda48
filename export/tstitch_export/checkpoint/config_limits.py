"""What a ``config.json`` asks for, compared with what the weights beside it hold, before any model is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.signatures import Shapes

__all__ = ["LARGEST_LATENT", "LARGEST_PICTURE", "check_numbers"]

LARGEST_LATENT: Final = 512  # elements along a side that a denoiser may state as its own size; published ones have 128
LARGEST_PICTURE: Final = 8192  # pixels that an autoencoder may
_LEVELS: Final = 12  # each halves the size
_LONGEST: Final = 64  # other lists: layers, blocks
# Numbers that count modules, of which each has tensors of its own in the file
_COUNTS: Final = (
    "layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block", "num_layers",
    "num_hidden_layers", "num_encoder_blocks", "num_decoder_blocks", "depth", "mid_block_layers",
)  # fmt: skip
_PER_LEVEL: Final = ("block_out_channels", "down_block_types", "up_block_types", "conditioning_embedding_out_channels")
# Numbers that no tensor shows: tokens, places in time, and what was left of a generator's settings
_UNSEEN: Final = ("_token_id", "_timesteps", "max_length", "min_length", "top_k", "chunk_size_feed_forward")


def check_numbers(config: Mapping[str, Any], shapes: Shapes, where: str, *, largest_size: int = LARGEST_LATENT) -> None:
    """Raises ``BadCheckpoint`` for a number in ``config`` that the tensors ``shapes`` can't bear out.

    A count of layers is at most that of the tensors, any other number at most their largest dimension, ``sample_size``
    at most ``largest_size``, and no whole number is below 0. A list has no more entries than any network of these kinds
    has levels or layers. ``where`` is the file's name.
    """
    most, count = max((max(shape, default=1) for shape in shapes.values()), default=1), len(shapes)
    total = 1
    for key, value in config.items():
        if isinstance(value, (list, tuple)):
            allowed = _LEVELS if key.endswith(_PER_LEVEL) else _LONGEST
            if len(value) > allowed:
                raise _refused(where, key, f"has {len(value)} entries; allowed are {allowed}")
        numbers = list(_numbers(value))
        counts = key.endswith(_COUNTS)
        for number in numbers:
            if key == "sample_size":
                if not 1 <= number <= largest_size:
                    raise _refused(where, key, f"is {_text(number)}; allowed is 1 to {largest_size} a side")
            elif counts and not 0 <= number <= count:
                raise _refused(where, key, f"is {_text(number)}, and the weights hold {count} tensors in all")
            elif isinstance(number, int) and number < 0 and not key.endswith(_UNSEEN):
                raise _refused(where, key, f"is {_text(number)}; allowed is 0 or more")
            elif not counts and abs(number) > max(most, _unseen(key)):
                raise _refused(where, key, f"is {_text(number)}, and the largest dimension in the weights is {most}")
        if counts and numbers:
            total *= max(1, int(sum(numbers)))
    if total > _LONGEST * max(count, 1):
        raise _refused(where, ", ".join(key for key in config if key.endswith(_COUNTS)),
                       f"ask for {total:,} layers in all, and the weights hold {count} tensors")  # fmt: skip


def _unseen(key: str) -> float:
    """What a number may be that no tensor shows."""
    return 1e9 if key.endswith(_UNSEEN) else 1024


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        yield value if isinstance(value, int) or math.isfinite(value) else math.inf
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _numbers(part)


def _text(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) or abs(number) > 10**15 else f"{number:,}"


def _refused(where: str, key: str, problem: str) -> BadCheckpoint:
    return BadCheckpoint(f"{where}: {key} {problem}", hint="copy config.json and the weights from the same model")
