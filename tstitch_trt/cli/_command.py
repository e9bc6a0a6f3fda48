"""What all commands share: options as records, help that ends in runnable examples, ``--traceback``, ``--json``.

An option is one field of a frozen dataclass: its type, default and help stand in one place, and the command gets the
record. Records that several commands take are in ``_options.py``.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import Field, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import click
from click.core import ParameterSource

from tstitch_engines.errors import BadInput, OutOfMemory, OutOfTime
from tstitch_trt.cli._completion import COMPLETERS, complete_bundle
from tstitch_trt.cli._defaults import NO_DEFAULTS, DefaultsFile, read_environment, said_elsewhere

__all__ = ["Command", "command_line", "option", "tstitch_command"]


class Command(click.Command):
    """A click command with ``--traceback``, whose help ends in ``examples``, one command line each."""

    def __init__(self, *args: Any, examples: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(line for line in examples.strip().splitlines() if line)
        # ``main`` reads it from the arguments: it must work where parsing itself fails
        text = "Show Python's traceback of an error, for developers."
        self.params.append(click.Option(["--traceback"], is_flag=True, expose_value=False, help=text))

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """With the defaults of the file and the environment, unless only help or a completion is wanted."""
        helped = not {"-h", "--help"}.isdisjoint(args)
        if helped and not isinstance(self, click.Group):  # ends here, unless the word is the value of an option
            with suppress(click.ClickException):
                super().make_context(info_name, [*args], parent, **extra)
            helped = False
        without = helped or self.name in NO_DEFAULTS or extra.get("resilient_parsing")
        if parent is not None and not without:
            path, above = [info_name or ""], parent
            while above.parent is not None:
                path.insert(0, above.info_name or "")
                above = above.parent
            extra["default_map"] = defaults_of(self, tuple(path), above)
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (BadInput, OutOfMemory, OutOfTime):
            for key, value, source in said_elsewhere(ctx):
                click.echo(f"note: --{key}{'' if value is True else f' {value}'} comes from {source}", err=True)
            raise

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for line in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def defaults_of(command: click.Command, path: tuple[str, ...], root: click.Context) -> dict[str, Any]:
    """``default_map`` of a command. Raises ``BadInput`` for what is wrong in the file's tables or the environment."""
    if not isinstance(command, click.Group):
        read_environment(command, path)
    file = DefaultsFile.read()
    if file is None:
        return {}
    assert isinstance(root.command, click.Group)
    file.check_tables(root.command.list_commands(root))
    return file.defaults(command, path)


def tstitch_command(
    name: str, examples: str, *, bundle: bool = True, bundles: bool = False, json: bool = True, **records: type[Any]
) -> Callable[[Callable[..., object]], click.Command]:
    """A function as the command ``name``. It is called with ``bundle`` (a ``Path``) or ``bundles`` (one text or more),
    ``as_json``, and each of the ``records`` by its keyword. The help lists their options in this order, those that a
    record inherits after its own."""

    def decorate(function: Callable[..., object]) -> click.Command:
        @functools.wraps(function)
        def run(**values: Any) -> object:
            made = {key: record(**{f.name: values.pop(f.name) for f in fields(record)})
                    for key, record in records.items()}  # fmt: skip
            return function(**values, **made)

        found: list[Callable[[Any], Any]] = [
            click.argument("bundle", type=click.Path(path_type=Path), shell_complete=complete_bundle)
        ] * bundle
        found += [
            click.argument(
                "bundles", nargs=-1, required=True, metavar="[NAME=]BUNDLE...", shell_complete=complete_bundle
            )
        ] * bundles
        for record in records.values():
            hints = typing.get_type_hints(record)
            own = [item for item in fields(record) if item.name in record.__annotations__]
            inherited = [item for item in fields(record) if item not in own]
            found += [_option(item, hints[item.name]) for item in (*own, *inherited)]
        found += [click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")] * json
        for add in reversed(found):
            run = add(run)
        return click.command(name, cls=Command, examples=examples)(run)

    return decorate


def option(
    text: str, metavar: str | None = None, *flags: str, default: Any = None, least: int | None = None,
    most: int | None = None, required: bool = False,
) -> Any:  # fmt: skip
    """A field of a record as an option. ``text``: its help. ``flags``: instead of ``--`` and the field's name.
    ``least`` and ``most`` bound whole numbers. A default is shown in the help."""
    said = {"help": text, "metavar": metavar, "flags": flags, "least": least, "most": most, "required": required}
    return field(default=default, metadata=said)


def _option(item: Field[Any], hint: Any) -> Callable[[Any], Any]:
    """The option of a field: ``X | None`` is an option of X, a tuple one that may be repeated, a bool a flag."""
    said = item.metadata
    names = said["flags"] or ("--" + item.name.replace("_", "-"),)
    kinds = typing.get_args(hint)
    kind = kinds[0] if NoneType in kinds else hint
    if kind is bool:
        return click.option(*names, item.name, is_flag=True, help=said["help"])
    many = typing.get_origin(kind) is tuple
    parsed: Any = str if many else kind
    if typing.get_origin(kind) is Literal:
        parsed = click.Choice(typing.get_args(kind))
    elif kind is Path:
        parsed = click.Path(path_type=Path)
    elif said["least"] is not None:
        parsed = click.IntRange(said["least"], said["most"])
    default: dict[str, Any] = {} if item.default is None or many else {"default": item.default, "show_default": True}
    return click.option(
        *names, item.name, type=parsed, multiple=many, metavar=said["metavar"], help=said["help"],
        required=said["required"], shell_complete=COMPLETERS.get(names[-1]) if parsed is str else None, **default,
    )  # fmt: skip


_OF_THE_OUTPUT = ("as_json", "plot", "output", "profile", "rebuild")


def command_line(*, without: Sequence[str] = _OF_THE_OUTPUT) -> str:
    """The running command as it was called, without the parameters ``without``: it makes the result again.

    Values from the file of defaults and the environment are in it.
    """
    import shlex

    context = click.get_current_context()
    words = ["tstitch-trt", str(context.command.name)]
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        value = context.params.get(name)
        if source in (None, ParameterSource.DEFAULT) or name in without or value is None or value is False:
            continue
        for one in value if parameter.multiple else [value]:
            flag = [] if isinstance(parameter, click.Argument) else [parameter.opts[-1]]
            words += flag if one is True else [*flag, str(one)]
    return shlex.join(words)
