"""The command line that was given, as text that gives it again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import click
from click.core import ParameterSource

__all__ = ["said_command"]


def said_command(context: click.Context, *, without: Sequence[str] = ("as_json",)) -> str:
    """The running command with its arguments and the options that were given, but for the parameters ``without``, and
    those that no command sees (``--traceback``)."""
    words = context.command_path.split()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in without or name not in context.params:
            continue
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        if isinstance(parameter, click.Argument):
            words.append(str(value))
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            words.append(parameter.opts[-1])
        else:
            for one in value if parameter.multiple else (value,):
                words += [parameter.opts[-1], str(one)]
    return shlex.join(words)
