"""Every failure as ``error: ...`` and ``hint: ...`` on stderr, click's own usage errors included."""

from __future__ import annotations

import errno
import os

import click
from click.core import ParameterSource

from tstitch_engines.errors import BadInput, FailedWork, TStitchError, nearest

__all__ = ["as_failure", "print_failure"]


def print_failure(failure: TStitchError) -> None:
    colour = not os.environ.get("NO_COLOR")  # click strips colour where stderr is no terminal, but does not read this
    for word, text, tint in (("error:", failure.message, "red"), ("hint:", failure.hint, "cyan")):
        click.echo(f"{click.style(word, fg=tint, bold=True) if colour else word} {text}", err=True)


def as_failure(error: Exception) -> TStitchError:
    """The error of our tree that says what ``error`` means to the person at the terminal."""
    if isinstance(error, TStitchError):
        return error
    if isinstance(error, click.ClickException):
        return _usage(error)
    if isinstance(error, MemoryError):
        return FailedWork(
            f"out of memory: {str(error) or 'an allocation failed'}", hint="use a smaller batch: -n or --batch"
        )
    if isinstance(error, OSError):
        return _system(error)
    return FailedWork(
        f"unexpected {type(error).__name__}: {error}",
        hint="this is a bug of tstitch-trt: run the command again with --traceback and report what it prints",
    )


def _system(error: OSError) -> TStitchError:
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if error.errno == errno.ENOSPC:
        return FailedWork(what, hint="free some space or write to another file system with -o; nothing was replaced")
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return BadInput(what, hint="check the path; folders that outputs go to must exist (mkdir -p)")
    if isinstance(error, PermissionError):
        return BadInput(what, hint="choose a path that you may read and write")
    return FailedWork(what, hint="check the file system; run with --traceback for details")


def _usage(error: click.ClickException) -> TStitchError:
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context else "tstitch-trt"
    if isinstance(error, click.NoSuchOption):
        parameters = context.command.get_params(context) if context else []
        options = [name for p in parameters if isinstance(p, click.Option) for name in p.opts]
        close = nearest(error.option_name, [name for name in options if name.startswith("--")])
        return BadInput(
            f"unknown option {error.option_name!r} of {path!r}",
            hint=f"did you mean {close!r}? All of them: {path} --help" if close else f"see {path} --help",
        )
    if isinstance(error, click.BadParameter) and error.param is not None:
        name = error.param.human_readable_name if isinstance(error.param, click.Argument) else error.param.opts[-1]
        if context is not None and context.get_parameter_source(error.param.name or "") is ParameterSource.ENVIRONMENT:
            name = f"${error.param.envvar}"
        if isinstance(error, click.MissingParameter):
            usage = context.get_usage().removeprefix("Usage: ") if context else path
            return BadInput(f"{path!r} needs {name}, got nothing", hint=f"write it as: {usage}; see {path} --help")
        problem = error.message.rstrip(".")
        if isinstance(error.param.type, click.types.BoolParamType):  # a flag, of the environment
            problem = f"{problem.partition('.')[0]}; allowed are 1, true, 0 and false"
        for theirs, plain in (("valid float", "number"), ("valid integer", "whole number")):
            problem = problem.replace(f"{theirs} range", plain).replace(theirs, plain)
        return BadInput(f"{name}: {problem}", hint=_example(path, error.param, context))
    return BadInput(error.format_message().rstrip("."), hint=f"see {path} --help")


def _example(path: str, parameter: click.Parameter, context: click.Context | None) -> str:
    if isinstance(parameter.type, click.Choice):
        return f"use one of: {', '.join(map(str, parameter.type.choices))}"
    text = getattr(parameter, "help", None)
    metavar = parameter.make_metavar(context) if context is not None else ""
    return f"{parameter.opts[-1]} {metavar}: {text}" if text else f"see {path} --help"
