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
    source = _Prompts(manifest, parsed, texts, guided) if parsed.prompts else None
    found: dict[str, dict[str, Values]] = {}
    for name in names:
        text = manifest.members[name].text
        if text is None:
            found[name] = {}
            continue
        if source is not None:
            hidden, pooled = source.values(name, names)
        else:
            hidden, pooled = _given(name, text, parsed, guided)
        found[name] = {"encoder_hidden_states": hidden}
        if pooled is not None:
            found[name]["text_embeds"] = pooled
        if text.time_ids != "none":
            found[name]["time_ids"] = _time_ids(text, parsed.micro, pixels)
    return found


class _Prompts:
    """The texts of a request, encoded once for all members."""

    def __init__(self, manifest: Manifest, parsed: ParsedRequest, texts: Texts | None, guided: bool) -> None:
        self._manifest = manifest
        self._texts = texts
        self._guided = guided
        self._prompts = parsed.prompts
        self._negatives = ("",) if parsed.negative_prompts is None else parsed.negative_prompts
        self._zeros = parsed.negative_prompts is None  # the unconditional half of members that say so
        self._encoded: Mapping[str, Encoded] | None = None

    def values(self, name: str, names: Sequence[str]) -> tuple[Values, Values | None]:
        """Hidden states and pooled projection for member ``name``, one of ``names``."""
        text = self._manifest.members[name].text
        assert text is not None, "asked for members with text only"
        parts = self._parts(names)
        hidden = np.concatenate([parts[encoder][0] for encoder in text.hidden], axis=-1)
        pooled = None if text.pooled is None else parts[text.pooled][1]
        if text.pooled is not None and pooled is None:
            raise BadInput(
                f"member {name!r} takes the pooled projection of {text.pooled!r}, which gives none",
                hint="build the bundle again from a pipeline whose text encoder has a projection",
            )
        zeros = text.zero_null and self._zeros
        return self._halves(hidden, zeros), None if pooled is None else self._halves(pooled, zeros)

    def _halves(self, rows: Array, zeros: bool) -> Values:
        count = len(self._prompts)
        if not self._guided:
            return Values(rows[:count])
        return Values(rows[:count], np.zeros_like(rows[:1]) if zeros else rows[count:])

    def _parts(self, names: Sequence[str]) -> Mapping[str, Encoded]:
        if self._encoded is None:
            members = [(n, t) for n in names if (t := self._manifest.members[n].text) is not None]
            wanted = dict.fromkeys(e for _, t in members for e in t.encoders)
            for name, text in members:
                missing = [e for e in text.encoders if self._texts is None or e not in self._texts]
                if missing or not text.hidden:
                    lacking = f"has no {' and no '.join(missing)}" if missing else "has no text encoder"
                    raise Unavailable(
                        f"the bundle {self._manifest.name!r} {lacking}, so it can't read prompts",
                        hint=f"encode the prompt yourself and give {_needed(name, text)}; or build the bundle from a "
                        "whole pipeline folder",
                    )
            assert self._texts is not None, "a bundle whose members take text was refused above"
            both = [*self._prompts, *(self._negatives if self._guided else [])]
            self._encoded = self._texts.encode(list(wanted), both)
        return self._encoded


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
