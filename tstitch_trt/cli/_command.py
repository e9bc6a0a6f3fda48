"""What all commands share: help that ends in runnable examples, ``--traceback`` and ``--json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

__all__ = ["Command", "command_line", "json_option", "traceback_option"]

F = TypeVar("F", bound=Callable[..., Any])


class Command(click.Command):
    """A click command whose help ends in ``examples``, one command line each."""

    def __init__(self, *args: Any, examples: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(line for line in examples.strip().splitlines() if line)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for line in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def traceback_option(function: F) -> F:
    """``--traceback``, read by ``main`` from the arguments: it must work where parsing itself fails."""
    return click.option(
        "--traceback", is_flag=True, expose_value=False, help="On an error show Python's traceback too (developers)."
    )(function)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")(function)


_OF_THE_OUTPUT = ("as_json", "plot", "output", "rebuild")


def command_line(context: click.Context, *, without: Sequence[str] = _OF_THE_OUTPUT) -> str:
    """The command that makes a result again: what was said, but for the parameters ``without``."""
    import shlex

    words = ["tstitch-trt", str(context.command.name)]
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source is None or source.name.startswith("DEFAULT") or name in without:
            continue
        value = context.params[name]
        for one in value if parameter.multiple else [value]:
            if isinstance(parameter, click.Argument):
                words.append(str(one))
            elif isinstance(parameter, click.Option) and parameter.is_flag:
                words += [parameter.opts[-1]] if one else []
            else:
                words += [parameter.opts[-1], str(one)]
    return shlex.join(words)
