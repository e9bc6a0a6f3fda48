"""Prompts, or the embeddings given in their place, as each member's text inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest, TextInputs
from tstitch_engines.errors import BadInput, NotFinite, Unavailable, unknown_name
from tstitch_trt.request.conditioning import Values
from tstitch_trt.request.options import PictureWishes

__all__ = ["Encoded", "Texts", "as_texts", "check_text_wishes", "text_count", "text_values"]

Array = NDArray[np.float32]
Encoded = tuple[Array, Array | None]
"""Hidden states ``[N,T,D]`` and pooled projection ``[N,E]`` of one text encoder."""

_TEXT_WISHES = ("prompt", "negative_prompt")
_EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_SIZES = ("original_size", "crop", "target_size")
_SCORES = ("aesthetic_score", "negative_aesthetic_score")


class Texts(Protocol):
    """The text encoders of a bundle that are loaded; ``in`` tells by name."""

    def __contains__(self, name: object) -> bool: ...

    def encode(self, names: Sequence[str], texts: Sequence[str]) -> Mapping[str, Encoded]:
        """What each of the encoders ``names`` makes of all texts, which get one ``T``."""


def as_texts(value: object, *, what: str) -> list[str]:
    """One text or several. Raises ``BadInput``."""
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else None
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadInput(f"{what} is {value!r}; allowed is a text or a list of texts", hint=f'e.g. {what}="a red fox"')
    return texts


def text_count(wishes: PictureWishes) -> int:
    """How many images the texts or embeddings alone speak of."""
    if wishes.get("prompt") is not None:
        return len(as_texts(wishes["prompt"], what="prompt"))
    embeds = wishes.get("prompt_embeds")
    first = next(iter(embeds.values()), None) if isinstance(embeds, Mapping) else embeds
    return 1 if first is None or not np.shape(first) else int(np.shape(first)[0])


def check_text_wishes(manifest: Manifest, wishes: PictureWishes, *, guided: bool) -> None:
    """Raises ``BadInput`` for wishes that a bundle of this kind can't or would not heed."""
    said = {name for name, value in wishes.items() if value is not None}
    texts = manifest.conditioning.kind == "text"
    if not texts:
        for name in (*_TEXT_WISHES, *_EMBEDS, *_SIZES, *_SCORES):
            if name in said:
                raise BadInput(
                    f"{name} was given, and the bundle {manifest.name!r} draws classes: it understands no text",
                    hint=f"ask for classes: labels=[0, 1] (--labels 0-{manifest.conditioning.classes - 1})",
                )
        return
    if "labels" in said:
        raise BadInput(
            f"labels were given, and the bundle {manifest.name!r} draws from text: it has no classes",
            hint='ask with prompt="..." (--prompt TEXT)',
        )
    both = said & {"prompt", "prompt_embeds"}
    if len(both) != 1:
        raise BadInput(
            "both prompt and prompt_embeds were given" if both else "nothing says what to draw",
            hint='give prompt="..." (--prompt TEXT), or prompt_embeds= (--prompt-embeds FILE.npz)',
        )
    negative = said & {"negative_prompt", "negative_prompt_embeds", "negative_pooled_prompt_embeds"}
    if negative and not guided:
        raise BadInput(
            f"{min(negative)} has no effect: no step of this plan is guided",
            hint="add guidance, e.g. guidance=7.5 (--guidance 7.5), or leave it out",
        )
    for key in _EMBEDS:
        given: Any = wishes.get(key)
        for name in given if isinstance(given, Mapping) else ():
            if name not in manifest.members:
                raise unknown_name("member", str(name), manifest.members, hint=f"(in {key})")
    kinds = {member.text.time_ids for member in manifest.members.values() if member.text is not None}
    for names, kind in ((_SIZES, "sizes"), (_SCORES, "aesthetic")):
        fits = kind in kinds or (names is _SIZES and "aesthetic" in kinds)
        if not fits and (extra := sorted(said & set(names))):
            raise BadInput(f"{extra[0]} was given, and no member of this bundle takes it", hint="leave it out")


def text_values(
    manifest: Manifest,
    names: Sequence[str],
    wishes: PictureWishes,
    texts: Texts | None,
    *,
    guided: bool,
    pixels: tuple[int, int],
) -> dict[str, dict[str, Values]]:
    """The text inputs of the members ``names``. ``pixels``: height and width of the picture.

    Raises ``Unavailable`` for a prompt without its text encoder, ``BadInput`` for embeddings that do not fit.
    """
    source = _Prompts(manifest, wishes, texts, guided) if wishes.get("prompt") is not None else None
    found: dict[str, dict[str, Values]] = {}
    for name in names:
        text = manifest.members[name].text
        if text is None:
            found[name] = {}
            continue
        if source is not None:
            hidden, pooled = source.values(name, names)
        else:
            hidden, pooled = _given(name, text, wishes, guided)
        found[name] = {"encoder_hidden_states": hidden}
        if pooled is not None:
            found[name]["text_embeds"] = pooled
        if text.time_ids != "none":
            found[name]["time_ids"] = _time_ids(text, wishes, pixels)
    return found


class _Prompts:
    """The texts of a request, encoded once for all members."""

    def __init__(self, manifest: Manifest, wishes: PictureWishes, texts: Texts | None, guided: bool) -> None:
        self._manifest = manifest
        self._texts = texts
        self._guided = guided
        self._prompts = as_texts(wishes["prompt"], what="prompt")
        negative = wishes.get("negative_prompt")
        self._said = negative is not None
        self._negatives = as_texts(negative, what="negative_prompt") if self._said else [""]
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
        zeros = text.zero_null and not self._said
        return self._halves(hidden, zeros), None if pooled is None else self._halves(pooled, zeros)

    def _halves(self, rows: Array, zeros: bool) -> Values:
        count = len(self._prompts)
        if not self._guided:
            return Values(rows[:count])
        return Values(rows[:count], np.zeros_like(rows[:1]) if zeros else rows[count:])

    def _parts(self, names: Sequence[str]) -> Mapping[str, Encoded]:
        if self._encoded is None:
            members = [(n, t) for n in names if (t := self._manifest.members[n].text) is not None]
            wanted = dict.fromkeys(e for _, t in members for e in (*t.hidden, *([t.pooled] if t.pooled else [])))
            for name, text in members:
                own = (*text.hidden, *([text.pooled] if text.pooled else []))
                missing = [e for e in own if self._texts is None or e not in self._texts]
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


def _given(name: str, text: TextInputs, wishes: PictureWishes, guided: bool) -> tuple[Values, Values | None]:
    """The embeddings that the request brings for one member."""
    hidden = _embedding(name, text, "prompt_embeds", wishes)
    assert hidden is not None, "checked before: there is a prompt or there are embeddings"
    pooled = _embedding(name, text, "pooled_prompt_embeds", wishes)
    other = _embedding(name, text, "negative_prompt_embeds", wishes) if guided else None
    other_pooled = _embedding(name, text, "negative_pooled_prompt_embeds", wishes) if guided else None
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


def _embedding(name: str, text: TextInputs, key: str, wishes: PictureWishes) -> Array | None:
    given: Any = wishes.get(key)
    if isinstance(given, Mapping):
        if name not in given:
            raise BadInput(f"{key} has nothing for member {name!r}; it has: {', '.join(given)}", hint="add it")
        given = given[name]
    if given is None:
        return None
    pooled = "pooled" in key
    width = text.pooled_width if pooled else text.width
    if pooled and not width:
        raise BadInput(f"{key} was given, and member {name!r} takes no pooled embedding", hint="leave it out")
    array = np.asarray(given)
    if array.ndim != (2 if pooled else 3) or not array.size or array.shape[-1] != width or array.dtype.kind != "f":
        raise BadInput(
            f"{key} is {array.dtype}{list(array.shape)}; member {name!r} needs "
            f"float[N{'' if pooled else ', T'}, {width}]",
            hint="give a dict by member where their widths differ: {'base': ..., 'refiner': ...}",
        )
    if not np.isfinite(array).all():
        raise NotFinite(f"{key} for member {name!r} holds NaN or infinity", hint="check what encoded the prompt")
    return np.ascontiguousarray(array, np.float32)


def _time_ids(text: TextInputs, wishes: PictureWishes, pixels: tuple[int, int]) -> Values:
    """SDXL's micro-conditioning (arXiv 2307.01952, section 2.2), one row for all images."""
    original = _pair(wishes.get("original_size"), "original_size", pixels, least=1)
    crop = _pair(wishes.get("crop"), "crop", (0, 0), least=0)
    if text.time_ids == "sizes":
        target = _pair(wishes.get("target_size"), "target_size", pixels, least=1)
        return Values(np.array([[*original, *crop, *target]], np.float32))
    scores = [
        default if (given := wishes.get(key)) is None else float(given)  # type: ignore[arg-type]  # a score is a float
        for key, default in (("aesthetic_score", 6.0), ("negative_aesthetic_score", 2.5))
    ]
    conditional, unconditional = (np.array([[*original, *crop, score]], np.float32) for score in scores)
    return Values(conditional, unconditional)


def _pair(value: object, what: str, default: tuple[int, int], *, least: int) -> tuple[int, int]:
    if value is None:
        return default
    whole = isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, int) and v >= least for v in value)
    if not whole:
        raise BadInput(
            f"{what} is {value!r}; allowed are two whole numbers of pixels from {least} on",
            hint=f"e.g. {what}=({default[0]}, {default[1]})",
        )
    assert isinstance(value, Sequence), "as was just seen"
    return int(value[0]), int(value[1])
