"""docs/reference/cli.md from the commands."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Final

import click

from support.compatibility.markdown import table
from tstitch_trt.cli import COMMANDS, cli

__all__ = ["commands", "shared_options"]

_GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "Start": ("demo", "doctor"),
    "Make bundles": ("build", "quantise", "verify", "inspect", "sign", "cache"),
    "Draw": ("sample", "serve", "ui", "export-triton"),
    "Choose the stitch point": ("bench", "profile", "calibrate", "evaluate", "search", "report"),
}
_OTHERS: Final = "Settings"
_SHARED_BY: Final = 5  # commands: an option of so many has its row once, below all commands


def commands() -> str:
    """Every command: usage, text, options, examples."""
    named = {name for names in _GROUPS.values() for name in names}
    groups = {**_GROUPS, _OTHERS: tuple(name for name in COMMANDS if name not in named)}
    parts = []
    for title, names in groups.items():
        if names:
            parts += [f"## {title}", *(_section(name, _command(name), "###") for name in names)]
    return "\n\n".join(parts)


def shared_options() -> str:
    return table(("option", "default", "meaning"), map(_row, _shared().values()))


def _command(name: str) -> click.Command:
    assert isinstance(cli, click.Group)
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


@cache
def _shared() -> Mapping[tuple[str, str], click.Option]:
    options = [option for name in COMMANDS for option in _options(_command(name))]
    counts = Counter(map(_key, options))
    return {_key(option): option for option in options if counts[_key(option)] >= _SHARED_BY}


def _key(option: click.Option) -> tuple[str, str]:
    return option.opts[-1], option.help or ""


def _options(command: click.Command) -> Iterator[click.Option]:
    return (p for p in command.params if isinstance(p, click.Option) and not p.hidden)


def _section(name: str, command: click.Command, level: str) -> str:
    # click keeps the help option that it made first
    context = click.Context(command, info_name=f"tstitch-trt {name}", **cli.context_settings)
    usage = command.get_usage(context).removeprefix("Usage: ")
    options = list(_options(command))
    shared = [option for option in options if _key(option) in _shared()]
    rows = [_row(option) for option in options if _key(option) not in _shared()]
    parts = [
        f"{level} `tstitch-trt {name}`",
        f"```text\n{' '.join(usage.split())}\n```",
        _text(command.help or ""),
    ]
    if rows:
        parts.append(table(("option", "default", "meaning"), rows))
    if shared:
        names = ", ".join(f"`{option.opts[-1]}`" for option in shared)
        takes = "Also takes" if rows else "Takes"
        parts.append(f"{takes} these [shared options](#options-of-several-commands): {names}.")
    examples = getattr(command, "examples", ())
    if examples:
        parts.append("```console\n" + "\n".join(f"$ {line}" for line in examples) + "\n```")
    if isinstance(command, click.Group):
        for sub, inner in command.commands.items():
            parts.append(_section(f"{name} {sub}", inner, level + "#"))
    return "\n\n".join(parts)


def _row(option: click.Option) -> list[str]:
    """Name and value, default, meaning. The default may stand in brackets at the end of the help's text."""
    text, default = option.help or "", ""
    if match := re.fullmatch(r"(.*)\s\[([^\]]+)\](\s?May be repeated\.)?", text, re.DOTALL):
        text, default = match[1] + (match[3] or ""), _text(match[2])
    elif match := re.fullmatch(r"(.*?)\s*\(default: ([^)]+)\)(.*)", text, re.DOTALL):
        text, default = f"{match[1]}{match[3]}", _text(match[2])
    elif option.show_default and not option.is_flag and option.default != "":
        default = f"`{option.default}`"
    if option.required:
        default = "required"
    metavar = "" if option.is_flag else f" {_metavar(option)}"
    names = ", ".join(f"`{name}`" for name in option.opts[:-1])
    return [f"{names}{', ' if names else ''}`{option.opts[-1]}{metavar}`", default, _text(text)]


def _metavar(option: click.Option) -> str:
    if option.metavar is None and isinstance(option.type, click.Choice):
        return "|".join(map(str, option.type.choices))
    return option.make_metavar(click.Context(click.Command("x")))


def _text(text: str) -> str:
    """A text of the help as Markdown: options and commands as code, links to pages, everything else as it is."""
    text = re.sub(r"(?<![\w`-])(--[a-z][\w-]*)", r"`\1`", inspect.cleandoc(text).replace("\b\n", ""))
    text = re.sub(r'(?<!`)\b(pip install "[^"]+")', r"`\1`", text)
    parts = re.split(r"(`[^`]*`)", text)
    text = "".join(part if part.startswith("`") else re.sub(r"[\[\]*_<]", r"\\\g<0>", part) for part in parts)
    return re.sub(r"\bdocs/([\w/-]+)\.md\b", lambda match: f"[{match[1]}](../{match[1]}.md)", text)
