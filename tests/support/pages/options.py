"""docs/support/backends.md and models.md: the options of backends and families, by the tables that check them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from support.compatibility.markdown import code, codes, table
from support.pages.words import as_markdown
from tstitch_engines.backends import BACKENDS
from tstitch_engines.backends.onnxruntime import OnnxRuntimeBackend
from tstitch_engines.backends.tensorrt.flavour import FLAVOURS, RTX, TENSORRT
from tstitch_engines.backends.tensorrt.options import OPTIONS
from tstitch_engines.backends.torch_reference import TorchBackend
from tstitch_export.families import FAMILIES, open_family

__all__ = ["backend_options", "family_options"]

_TYPES: Final = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}


def backend_options() -> str:
    assert {"onnxruntime", "torch", *FLAVOURS} == BACKENDS.keys()
    rows = []
    for name, (kind, text) in OPTIONS.items():
        meaning, default = _split(text)
        refused = [
            _who(flavour.title, flavour.refused[name]) for flavour in FLAVOURS.values() if name in flavour.refused
        ]
        rows.append([code(name), _TYPES[kind], default, ". ".join([meaning, *refused])])
    return "\n\n".join(
        [
            "### `onnxruntime`",
            _table(OnnxRuntimeBackend.options),
            f"### `{TENSORRT.name}` and `{RTX.name}`",
            table(("option", "value", "default", "meaning"), rows),
            "### `torch`",
            _table(TorchBackend.options),
        ]
    )


def _who(title: str, why: str) -> str:
    return f"Refused by {title}: {as_markdown(why)}"


def family_options() -> str:
    """One row an option; families that have it in the last column."""
    having: dict[tuple[str, type, str], list[str]] = {}
    for name in FAMILIES:
        for option, (kind, text) in open_family(name).options.items():
            having.setdefault((option, kind, text), []).append(name)
    rows = []
    for (option, kind, text), names in sorted(having.items(), key=lambda item: item[0][0]):
        meaning, default = _split(text)
        rows.append([code(option), _TYPES[kind], default, meaning, codes(names)])
    return table(("option", "value", "default", "meaning", "families"), rows)


def _table(options: Mapping[str, tuple[type, str]]) -> str:
    rows = [[code(name), _TYPES[kind], *reversed(_split(text))] for name, (kind, text) in options.items()]
    return table(("option", "value", "default", "meaning"), rows)


def _split(text: str) -> tuple[str, str]:
    """Meaning and default of a text such as ``how long to look (default: 3)``."""
    match = re.fullmatch(r"(.*) \(default: ([^()]*)\)|(.*); default (\w+)", text)
    if match is None:
        return as_markdown(text), ""
    return as_markdown(match[1] or match[3]), as_markdown(match[2] or match[4])
