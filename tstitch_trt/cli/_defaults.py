"""Defaults of options: one TOML file, and a variable of the environment for each option.

    [all]                   # options that mean the same for every command
    device = "cuda"

    [sample]                # options of `tstitch-trt sample`
    steps = 20

The command line comes before the environment, the environment before the file, and a command's own table before
``[all]``. A value from any of them counts as said by the user. Options that let foreign code run or let strangers in
are for the command line alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from tstitch_engines.checks import shown
from tstitch_engines.errors import BadInput, nearest, unknown_name

__all__ = [
    "NO_DEFAULTS",
    "PREFIX",
    "SHARED",
    "VARIABLES",
    "DefaultsFile",
    "config_path",
    "converted",
    "option_key",
    "read_environment",
    "said_elsewhere",
    "settable",
    "variables_of",
]

PREFIX: Final = "TSTITCH_TRT_"
VARIABLES: Final = {
    "TSTITCH_TRT_CACHE": "Folder of the cache of exports and engines.",
    "TSTITCH_TRT_CONFIG": "File of defaults; empty for none.",
    "TSTITCH_TRT_KEY_PASSPHRASE": "Passphrase of a signing key.",
    "TSTITCH_TRT_NVTX": "1: spans go to NVTX, for Nsight Systems.",
    "TSTITCH_TRT_TRACEBACK": "1: Python's traceback with every error.",
}
SHARED: Final = ("device", "graph", "max-memory", "memory-limit", "require-signature", "threads", "time-limit")
"""What the table ``[all]`` may hold."""
NO_DEFAULTS: Final = ("completion", "config")
"""Commands whose options have none. They run where the file is wrong."""

_TYPED: Final = ("trust", "insecure", "traceback")
_BYTES: Final = 128 << 10


def config_path() -> Path | None:
    """``$TSTITCH_TRT_CONFIG``, else ``tstitch-trt/config.toml`` in the user's folder of configurations.

    ``None`` where the variable is empty, and for a user without a home. Raises ``BadInput`` where it names no file.
    """
    chosen = os.environ.get("TSTITCH_TRT_CONFIG")
    if chosen == "":
        return None
    if chosen is not None:
        path = _expanded(Path(chosen), "$TSTITCH_TRT_CONFIG")
        if not path.is_file():
            raise BadInput(f"$TSTITCH_TRT_CONFIG is {shown(chosen)}, which is no file", hint="correct it, or unset it")
        return path
    base = Path(os.environ.get("XDG_CONFIG_HOME", ""))  # the XDG rules ignore a relative one
    try:
        return (base if base.is_absolute() else Path.home() / ".config") / "tstitch-trt" / "config.toml"
    except RuntimeError:  # neither $HOME nor an entry in the list of users, as in some containers
        return None


def _expanded(path: Path, where: str) -> Path:
    """``path`` with the folder that ``~`` means. Raises ``BadInput``."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise BadInput(
            f"{where} is {shown(str(path))}: {path.parts[0]} is the home of nobody here", hint="write the whole path"
        ) from None


def option_key(option: click.Parameter) -> str:
    """``latents-out`` for ``--latents-out``; ``n`` for ``-n``."""
    return option.opts[-1].lstrip("-")


def settable(command: click.Command) -> dict[str, click.Option]:
    """The options of ``command`` that the file may set, by key.

    To name the backend is to trust its engines, so where there is ``--trust`` that is for the command line too.
    """
    if command.name in NO_DEFAULTS:
        return {}
    options = {option_key(p): p for p in command.params if isinstance(p, click.Option)}
    typed = {*_TYPED, "backend"} if "trust" in options else _TYPED
    return {key: option for key, option in options.items() if key not in typed}


def variables_of(command: click.Command, path: tuple[str, ...]) -> dict[str, click.Option]:
    """The options of the command ``path`` by variable. Those that may be repeated have none: values hold spaces."""
    start = PREFIX + "_".join(path)
    return {
        f"{start}_{key}".replace("-", "_").upper(): option
        for key, option in settable(command).items()
        if not option.multiple
    }


def read_environment(command: click.Command, path: tuple[str, ...]) -> None:
    """Tells each option its variable. Raises ``BadInput`` for variables of this command that it does not have."""
    known = variables_of(command, path)
    for variable, option in known.items():
        option.envvar = variable
    start = (PREFIX + "_".join(path) + "_").replace("-", "_").upper()
    for name in os.environ:
        if name.startswith(start) and name not in known:
            key = name.removeprefix(start).lower().replace("_", "-")
            options = {option_key(p): p for p in command.params}
            if key in options:
                raise _not_here(f"${name}", key, "be set by the environment")
            close = nearest(name, known)
            raise BadInput(
                f"${name}: {' '.join(path)} has no option --{key}",
                hint=f"did you mean {close}?" if close else f"unset it; tstitch-trt {' '.join(path)} --help lists them",
            )


def converted(option: click.Option, value: object, where: str) -> object:
    """``value`` as the type of ``option``. Raises ``BadInput``, which says ``where`` it stands."""
    try:
        return option.type.convert(value, option, None)
    except click.BadParameter as error:
        allowed = "; allowed are 1, true, 0 and false" if option.is_flag else ""
        problem = error.message.partition(" Recognized values")[0].rstrip(".")
        raise BadInput(f"{where}: {problem}{allowed}", hint=f"--{option_key(option)}: {option.help}") from None


def _not_here(where: str, key: str, what: str) -> BadInput:
    return BadInput(f"{where}: --{key} can't {what}", hint=f"write --{key} on the command line where you want it")


@dataclass(frozen=True)
class DefaultsFile:
    """The file, decoded; its tables are checked for one command at a time."""

    path: Path
    text: str
    tables: Mapping[str, Any]

    @staticmethod
    def read() -> DefaultsFile | None:
        """``None`` where there is no file. Raises ``BadInput``."""
        from tstitch_engines.bundle.decode import DecodeError
        from tstitch_engines.bundle.read import read_text, read_toml

        path = config_path()
        if path is None or not path.exists():
            return None
        try:
            text = read_text(path, _BYTES)
            if text.startswith("\ufeff"):
                raise BadInput(f"{path} begins with a byte order mark", hint="save it as UTF-8 without one (BOM)")
            return DefaultsFile(path, text, read_toml(path, _BYTES))
        except (OSError, DecodeError) as error:
            raise BadInput(f"{path}: {error}", hint="correct it, or set TSTITCH_TRT_CONFIG= to go without") from None

    def check_tables(self, commands: list[str]) -> None:
        """Raises ``BadInput`` for a table that belongs to no command, and for a wrong key in ``[all]``."""
        for name, table in self.tables.items():
            if name not in ("all", *commands):
                raise unknown_name("table", name, ["all", *commands], hint=f"({self._place('', name)})")
            if not isinstance(table, dict):
                raise BadInput(f"{self._place('', name)}: {name} is no table", hint=f"write [{name}] and options below")
        for key in self.tables.get("all", {}):
            if key not in SHARED:
                where = self._place("all", key)
                raise unknown_name(
                    "key of [all]", key, SHARED, hint=f"({where}) Others stand in their command's table."
                )

    def defaults(self, command: click.Command, path: tuple[str, ...]) -> dict[str, Any]:
        """``default_map`` of the command ``path``: values by parameter. Raises ``BadInput``."""
        name, own = ".".join(path), self.tables
        for part in path:
            own = own.get(part, {})
            if not isinstance(own, dict):
                raise BadInput(f"{self.path}: {name} is no table", hint=f"write [{name}] and its options below")
        if isinstance(command, click.Group):
            for key in own:
                if key not in command.commands:
                    raise unknown_name("table", f"{name}.{key}", [f"{name}.{c}" for c in command.commands])
            return {}
        known = settable(command)
        found: dict[str, Any] = {}
        for table, values in (("all", self.tables.get("all", {})), (name, own)):
            for key, value in values.items():
                if key in known:
                    found[known[key].name or ""] = self._value(table, known[key], value)
                elif table != "all":
                    raise self._unknown(command, table, key, known)
        return found

    def _unknown(self, command: click.Command, table: str, key: str, known: Mapping[str, click.Option]) -> BadInput:
        where = self._place(table, key)
        if any(option_key(p) == key for p in command.params if isinstance(p, click.Option)):
            return _not_here(where, key, "be set by a file")
        close = nearest(key, known)
        return BadInput(
            f"{where}: tstitch-trt {table.replace('.', ' ')} has no option --{key}",
            hint=f"did you mean {close!r}?" if close else f"allowed: {', '.join(known)}",
        )

    def _value(self, table: str, option: click.Option, value: object) -> object:
        where = self._place(table, option_key(option))
        if option.is_flag:
            return _as_kind(value, bool, where, "true or false")
        if option.multiple:
            values = _as_kind(value, list, where, "a list")
            return [self._one(option, one, where) for one in values]
        return self._one(option, value, where)

    def _one(self, option: click.Option, value: object, where: str) -> object:
        kind = option.type
        if isinstance(kind, click.types.IntParamType):
            value = _as_kind(value, int, where, "a whole number")
        elif isinstance(kind, click.types.FloatParamType):
            value = _as_kind(value, (int, float), where, "a number")
        elif isinstance(kind, (click.Choice, click.Path)):
            value = _as_kind(value, str, where, "a text")
        else:
            value = str(_as_kind(value, (str, int, float), where, "a text or a number"))
        found = converted(option, value, where)
        return _expanded(found, where) if isinstance(found, Path) else found

    def _place(self, table: str, key: str) -> str:
        """``FILE, line N: [table] key``, as far as the line is found."""
        what, current = f"[{table}] {key}" if table else key, ""
        for number, line in enumerate(self.text.splitlines(), start=1):
            header, entry = re.match(r"\s*\[+\s*([^]]*?)\s*\]+", line), re.match(r'\s*"?([\w.-]+)"?\s*=', line)
            if header is not None:
                current = header[1]
            if (header and not table and current == key) or (entry and current == table and entry[1] == key):
                return f"{self.path}, line {number}: {what}"
        return f"{self.path}: {what}"


def _as_kind(value: Any, kinds: type | tuple[type, ...], where: str, what: str) -> Any:
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise BadInput(f"{where} is {shown(value)}; allowed is {what}", hint=f"write it as {what}")
    return value


def said_elsewhere(context: click.Context) -> Iterator[tuple[str, object, str]]:
    """Options of a parsed command that the file or the environment set: key, value and where from."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if source is ParameterSource.DEFAULT_MAP:
            yield option_key(option), context.params.get(option.name or ""), str(config_path())
        elif source is ParameterSource.ENVIRONMENT:
            yield option_key(option), context.params.get(option.name or ""), f"${option.envvar}"
