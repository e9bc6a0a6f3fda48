"""The number of tokens of the texts on the page, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from tstitch_engines.errors import BadInput, TStitchError
from tstitch_trt.plots.templates import fill
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.runtime.text_encoder import PromptLength

__all__ = ["check_lengths", "lengths", "token_counts", "too_long"]


def lengths(runtime: Runtime, texts: Mapping[str, object]) -> dict[str, PromptLength]:
    """By name, of those of ``texts`` that can be read; of none where ``tokenizers`` is not installed."""
    found: dict[str, PromptLength] = {}
    for name, text in texts.items():
        try:
            length = runtime.prompt_length(text) if isinstance(text, str) and text else None
        except TStitchError:
            length = None  # drawing will say what is wrong
        if length is not None:
            found[name] = length
    return found


def too_long(found: Mapping[str, PromptLength]) -> str:
    """Why nothing can be drawn, or an empty text."""
    names = (name for name, length in found.items() if length.tokens > length.most)
    return next((f"{name} too long: {found[name].tokens} of {found[name].most} tokens" for name in names), "")


def check_lengths(found: Mapping[str, PromptLength]) -> None:
    """Raises ``BadInput`` for a text that does not fit."""
    for name, length in found.items():
        if length.tokens > length.most:
            raise BadInput(
                f"the {name.lower()} has {length.tokens:,} tokens; the engines take {length.most:,}",
                hint=f"shorten it, or build the bundle with longer --tokens (now {length.most // length.chunk} chunks)",
            )


def token_counts(found: Mapping[str, PromptLength]) -> Markup:
    return fill("ui/tokens.html", lengths=found)
