"""Errors of what an accelerated pipeline is built and run with, in the words of who called it.

Below, hints name options of the command line, which builds and loads bundles; here there are arguments of
``accelerate`` and of the pipeline, and files that it saved for the build are its modules.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from tstitch_engines.errors import TStitchError

__all__ = ["in_callers_words", "notes_in_callers_words", "reworded"]

_PARTS: Final = {"vae_decoder": "vae", "vae_encoder": "vae"}
_RENAMED: Final = {  # options that accelerate or the pipeline's call has under another name
    "steps": "num_inference_steps", "guidance": "guidance_scale", "budget_ms": "latency_budget_ms", "seed": "generator",
    "seeds": "generator", "control": "control_image", "mask": "mask_image", "trust": "fresh", "rebuild": "fresh",
}  # fmt: skip
_VALUE: Final = r"[^\s;)]*[^\s;,.)]"
_RANGE: Final = r"MIN:OPT:MAX|[\d:]+"
_SWITCHES: Final = ("fresh", "trust", "rebuild")
# Commands that whoever has this package also has, on a bundle that accelerate made too
_COMMANDS: Final = re.compile(r"(?:tstitch-trt (?!build)[a-z]+|pip install)(?: [^\s;,()]+)*")
_TAKEN: Final = re.compile(  # what of a command that builds is an argument of accelerate
    rf"--(?:option|precision|backend|device) {_VALUE}|--(?:batch|height|width|tokens) (?:{_RANGE})|--fresh"
)


def _literal(text: str) -> str:
    """A value of the command line as Python has it."""
    if text in ("true", "false"):
        return text.capitalize()
    return text if re.fullmatch(r"-?\d+(\.\d+)?|N|VALUE", text) else f'"{text}"'


def _option(match: re.Match[str]) -> str:
    name, value = match["name"], match["value"]
    return f'options={{"{name}": {_literal(value)}}}' if value else f'options["{name}"]'


def _precision(match: re.Match[str]) -> str:
    name, value = match["name"], match["value"]
    return f'precision={{"{name}": "{value}"}}' if name else f'precision="{value}"'


def _member(match: re.Match[str]) -> str:
    return "small=" if match["name"] != "large" else "the pipeline's unet"


def _part(match: re.Match[str]) -> str:
    return f"pipe.{_PARTS.get(match['name'], match['name'])}"


def _any(match: re.Match[str]) -> str:
    name = match["name"].replace("-", "_")
    value = "True" if name in _SWITCHES else _literal(match["value"]) if match["value"] else ""
    return f"{_RENAMED.get(name, name)}={value}"


def _ranged(match: re.Match[str]) -> str:
    return f"{match['name']}=" + (f'"{match["value"]}"' if match["value"] else "")


def _build(match: re.Match[str]) -> str:
    flags = [_reworded(flag) for flag in _TAKEN.findall(match[0])]
    return f"tstitch_trt.accelerate(..., {', '.join(flags) or 'fresh=True'})"


# In this order: whole commands, what says both already, options with a form of their own, all others
_RULES: Final[tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]] = (
    (r"(?:use|choose|write) (?:the|a) recipe.*", "give a small UNet of the pipeline's own kind"),
    (r"recipe '[\w-]+'", "a pipeline of this class"),
    (r"the recipe (?=says|expects|has)", "the pipeline's class "),
    (r"; --partial[^;]*", ""),
    (r"(?:TSTITCH_TRT_CACHE=\S+ )?tstitch-trt build(?: [^\s;()]*[^\s;,()])*", _build),
    (r"--[a-z-]+(?: [^\s(]+)?(?: or --[a-z-]+)? \((?P<own>[a-z_]+= ?[^()]*)\)", r"\g<own>"),
    (r"(?<=\S) \((?:e\.g\. )?--[a-z-]+[^()]*\)", ""),
    (r"--latents-out(?: [A-Z]\S*[a-z])?(?:, or sample\(decode=False\))?", 'output_type="latent"'),
    (rf"--option (?P<name>[\w.-]+)(?:=(?P<value>{_VALUE}))?", _option),
    (rf"--precision (?:(?P<name>\w+)=)?(?P<value>{_VALUE})", _precision),
    (rf"--member (?P<name>\w+)={_VALUE}", _member),
    (rf"--part (?P<name>\w+)(?:={_VALUE})?", _part),
    (rf"--lora \w+={_VALUE}", "pipe.fuse_lora()"),
    (rf"--(?P<name>batch|height|width|tokens)\b(?: (?P<value>{_RANGE}))?", _ranged),
    (rf"--(?P<name>(?:device|backend|threads|[a-z]+-limit|max-memory|steps|guidance|budget-ms|fraction|strength|"
     rf"variance)) (?P<value>{_VALUE})", _any),
    (r"--(?P<name>[a-z][a-z-]*[a-z])(?P<value>)(?: [A-Z]\S*)?", _any),
    (r"\b(?P<name>guidance|steps)(?P<value>)=(?=[\d\[.])", _any),
)  # fmt: skip


def reworded(text: str, files: Mapping[str, str] | None = None) -> str:
    """``text`` in Python's words. ``files``: what is at a path that the caller does not know, longest paths first."""
    for path, what in sorted((files or {}).items(), key=lambda entry: -len(entry[0])):
        text = text.replace(path, what)
    pieces, end = [], 0
    for command in _COMMANDS.finditer(text):
        pieces += [_reworded(text[end : command.start()]), command[0]]
        end = command.end()
    return "".join([*pieces, _reworded(text[end:])])


def _reworded(text: str) -> str:
    for pattern, replacement in _RULES:
        text = re.sub(pattern, replacement, text)
    return text


@contextmanager
def in_callers_words(files: Mapping[str, str] | None = None) -> Iterator[None]:
    """Rewords errors that leave it; see ``reworded``."""
    try:
        yield
    except TStitchError as error:
        error.message, error.hint = reworded(error.message, files), reworded(error.hint, files)
        error.args = (error.message, error.hint)
        raise


@contextmanager
def notes_in_callers_words() -> Iterator[None]:
    """Rewords what a build notes in the log, but for text encoders that it lacks: the pipeline has them."""

    def change(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        record.msg, record.args = reworded(text), ()
        return "in place of prompts" not in text

    log = logging.getLogger("tstitch_export.build")
    log.addFilter(change)
    try:
        yield
    finally:
        log.removeFilter(change)
