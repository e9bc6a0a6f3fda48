"""Prompts, or the embeddings given in their place, as each member's text inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest, TextInputs
from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.request.conditioning import Values
from tstitch_trt.request.parse import MicroConditioning, ParsedRequest

__all__ = ["Encoded", "Texts", "text_values"]

Array = NDArray[np.float32]
Encoded = tuple[Array, Array | None]
"""Hidden states ``[N,T,D]`` and pooled projection ``[N,E]`` of one text encoder."""


class Texts(Protocol):
    """The text encoders of a bundle that are loaded; ``in`` tells by name."""

    def __contains__(self, name: object) -> bool: ...

    def encode(self, names: Sequence[str], texts: Sequence[str]) -> Mapping[str, Encoded]:
        """What each of the encoders ``names`` makes of all texts, which get one ``T``."""


def text_values(
    manifest: Manifest,
    names: Sequence[str],
    parsed: ParsedRequest,
    texts: Texts | None,
    *,
    guided: bool,
    pixels: tuple[int, int],
) -> dict[str, dict[str, Values]]:
    """The text inputs of the members ``names``. ``pixels``: height and width of the picture.

    Raises ``Unavailable`` for a prompt without its text encoder, ``BadInput`` for embeddings that do not fit.
    """
    encoded = _encode(manifest, names, parsed, texts, guided) if parsed.prompts else {}
    found: dict[str, dict[str, Values]] = {}
    for name in names:
        text = manifest.members[name].text
        if text is None:
            found[name] = {}
            continue
        if parsed.prompts:
            hidden, pooled = _spoken(name, text, encoded, parsed, guided)
        else:
            hidden, pooled = _given(name, text, parsed, guided)
        found[name] = {"encoder_hidden_states": hidden}
        if pooled is not None:
            found[name]["text_embeds"] = pooled
        if text.time_ids != "none":
            found[name]["time_ids"] = _time_ids(text, parsed.micro, pixels)
    return found


def _encode(
    manifest: Manifest, names: Sequence[str], parsed: ParsedRequest, texts: Texts | None, guided: bool
) -> Mapping[str, Encoded]:
    """The prompts, and when ``guided`` the negative ones after them, by every encoder of the members ``names``."""
    members = {name: text for name in names if (text := manifest.members[name].text) is not None}
    for name, text in members.items():
        missing = [encoder for encoder in text.encoders if texts is None or encoder not in texts]
        if missing or not text.hidden:
            lacking = f"has no {' and no '.join(missing)}" if missing else "has no text encoder"
            raise Unavailable(
                f"the bundle {manifest.name!r} {lacking}, so it can't read prompts",
                hint=f"encode the prompt yourself and give {_needed(name, text)}; or build the bundle from a "
                "whole pipeline folder",
            )
    if texts is None or not members:
        return {}
    wanted = dict.fromkeys(encoder for text in members.values() for encoder in text.encoders)
    negatives = ("",) if parsed.negative_prompts is None else parsed.negative_prompts
    return texts.encode(list(wanted), [*parsed.prompts, *(negatives if guided else ())])


def _spoken(
    name: str, text: TextInputs, parts: Mapping[str, Encoded], parsed: ParsedRequest, guided: bool
) -> tuple[Values, Values | None]:
    """Hidden states and pooled projection for one member, from what its encoders made of the texts."""
    hidden = np.concatenate([parts[encoder][0] for encoder in text.hidden], axis=-1)
    pooled = None if text.pooled is None else parts[text.pooled][1]
    if text.pooled is not None and pooled is None:
        raise BadInput(
            f"member {name!r} takes the pooled projection of {text.pooled!r}, which gives none",
            hint="build the bundle again from a pipeline whose text encoder has a projection",
        )
    count, zeros = len(parsed.prompts), text.zero_null and parsed.negative_prompts is None

    def halves(rows: Array) -> Values:
        if not guided:
            return Values(rows[:count])
        return Values(rows[:count], np.zeros_like(rows[:1]) if zeros else rows[count:])

    return halves(hidden), None if pooled is None else halves(pooled)


def _needed(name: str, text: TextInputs) -> str:
    """``prompt_embeds= [N,T,2048] and pooled_prompt_embeds= [N,1280] (member 'base')``."""
    pooled = f" and pooled_prompt_embeds= [N,{text.pooled_width}]" if text.pooled_width else ""
    return f"prompt_embeds= [N,T,{text.width}]{pooled} (member {name!r})"


def _given(name: str, text: TextInputs, parsed: ParsedRequest, guided: bool) -> tuple[Values, Values | None]:
    """The embeddings that the request brings for one member."""
    hidden = _embedding(name, text, "prompt_embeds", parsed)
    assert hidden is not None, "checked before: there is a prompt or there are embeddings"
    pooled = _embedding(name, text, "pooled_prompt_embeds", parsed)
    other = _embedding(name, text, "negative_prompt_embeds", parsed) if guided else None
    other_pooled = _embedding(name, text, "negative_pooled_prompt_embeds", parsed) if guided else None
    if text.pooled_width and pooled is None:
        raise BadInput(
            f"member {name!r} takes a pooled embedding as well, and pooled_prompt_embeds was not given",
            hint=f"give {_needed(name, text)}",
        )
    if guided and other is None:
        if not text.zero_null:
            raise BadInput(
                f"guidance needs an unconditional half for member {name!r}, and negative_prompt_embeds was not given",
                hint=f"give negative_prompt_embeds= [N,T,{text.width}] (of the empty prompt, for one), or guidance=1",
            )
        other = np.zeros_like(hidden[:1])
        other_pooled = None if pooled is None else np.zeros_like(pooled[:1])
    if guided and pooled is not None and other_pooled is None:
        raise BadInput(
            f"negative_prompt_embeds was given for member {name!r}, and negative_pooled_prompt_embeds was not",
            hint=f"give negative_pooled_prompt_embeds= [N,{text.pooled_width}] too",
        )
    if other is not None and other.shape[1] != hidden.shape[1]:
        raise BadInput(
            f"prompt_embeds have {hidden.shape[1]} tokens and negative_prompt_embeds {other.shape[1]}; both halves of "
            "a guided step have one length",
            hint="encode both with the same number of 77-token chunks",
        )
    return Values(hidden, other), None if pooled is None else Values(pooled, other_pooled)


def _embedding(name: str, text: TextInputs, key: str, parsed: ParsedRequest) -> Array | None:
    if key not in parsed.embeddings:
        return None
    given = parsed.embeddings[key]
    if name not in given:
        raise BadInput(f"{key} has nothing for member {name!r}; it has: {', '.join(given)}", hint="add it")
    pooled = "pooled" in key
    width = text.pooled_width if pooled else text.width
    if pooled and not width:
        raise BadInput(f"{key} was given, and member {name!r} takes no pooled embedding", hint="leave it out")
    array = given[name]
    if array.shape[-1] != width:
        raise BadInput(
            f"{key} is {array.dtype}{list(array.shape)}; member {name!r} needs "
            f"float[N{'' if pooled else ', T'}, {width}]",
            hint="give a dict by member where their widths differ: {'base': ..., 'refiner': ...}",
        )
    return array


def _time_ids(text: TextInputs, micro: MicroConditioning, pixels: tuple[int, int]) -> Values:
    """SDXL's micro-conditioning (arXiv 2307.01952, section 2.2), one row for all images."""
    sizes = (*(micro.original_size or pixels), *(micro.crop or (0, 0)))
    if text.time_ids == "sizes":
        return Values(np.array([[*sizes, *(micro.target_size or pixels)]], np.float32))
    conditional, unconditional = (np.array([[*sizes, score]], np.float32) for score in micro.scores)
    return Values(conditional, unconditional)
