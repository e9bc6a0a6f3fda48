"""The ``tstitch-trt`` command. Data goes to stdout, logs, progress and errors to stderr.

Each command lives in a file of its own that is imported when the command is named, and imports what is heavy inside
its function: ``--help`` needs click and nothing else.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

import click

from tstitch_engines.version import VERSION
from tstitch_trt.cli._command import Command
from tstitch_trt.cli._errors import as_failure, print_failure
from tstitch_trt.cli._signals import watch_signals

__all__ = ["cli", "main"]

# name -> one line of help, here so that `tstitch-trt --help` imports none of the commands
COMMANDS = {
    "demo": "Build the built-in pair and draw it at several stitch points, with time and quality.",
    "build": "Export and compile the models of a recipe into a bundle, or add engines to a bundle.",
    "sample": "Draw images from a bundle.",
    "bench": "Measure engines, step kernels and stitched trajectories of a bundle.",
    "calibrate": "Measure what sampling costs on this machine, for --budget-ms and search.",
    "profile": "Compare the members of a bundle step by step and suggest a schedule.",
    "inspect": "Show what a bundle holds: members, inputs, engines, sources and hashes.",
    "sign": "Sign a bundle, so that others can check that it is yours.",
    "verify": "Compare every engine of a bundle with ONNX Runtime and PyTorch.",
    "evaluate": "Measure how good the pictures of a bundle are over a list of schedules.",
    "search": "Find the schedules, step counts and solvers with the best quality for their time.",
    "cache": "List the cache of exports and engines, prune it or clear it.",
    "quantise": "Quantise one member of a bundle to int8 or fp8 and report what that costs.",
    "export-triton": "Write a bundle as a model of Triton Inference Server.",
    "ui": "Draw in the browser at any stitch point, next to measured time and quality.",
    "serve": "Serve bundles over HTTP, batching the steps of all requests; OpenAI's client works unchanged.",
    "report": "Write an HTML page about a bundle: samples, studies, machines, commands.",
    "config": "Show the defaults that a file or the environment gives to options, or write such a file.",
    "completion": "Print the script that makes bash, zsh or fish complete this command.",
    "doctor": "Show what this machine can build and run, and how to fix what it can't.",
}

EXAMPLES = """
tstitch-trt demo
tstitch-trt build fashion -o fashion.bundle
tstitch-trt sample fashion.bundle --labels 0-9 --fraction 0.4 -o grid.png
"""


class _Lazy(Command, click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"tstitch_trt.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from tstitch_engines.errors import BadInput, unknown_name

        if args and args[0] in ("help", "version"):
            raise BadInput(f"{args[0]!r} is no command, but an option", hint=f"write it as: tstitch-trt --{args[0]}")
        if args and not args[0].startswith("-") and args[0] not in COMMANDS and not ctx.resilient_parsing:
            raise unknown_name("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(
    cls=_Lazy,
    examples=EXAMPLES,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(VERSION, prog_name="tstitch-trt", message="%(prog)s %(version)s")
def cli() -> None:
    """T-Stitch with compiled engines: a small diffusion model runs the early steps, a large one the late steps.

    Options may have defaults in a file and in the environment: tstitch-trt config.

    Data goes to stdout (--json prints one JSON document), logs and progress to stderr. Exit codes: 0 done, 1 the work
    failed, 2 bad input, 130 interrupted, 143 terminated.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 failed work, 2 bad input, 130 Ctrl-C, 143 SIGTERM, 129
    SIGHUP."""
    args = list(sys.argv[1:] if argv is None else argv)
    developer = "--traceback" in args or os.environ.get("TSTITCH_TRT_TRACEBACK", "") not in ("", "0")
    with watch_signals() as caught:
        try:
            code = cli.main(args, prog_name="tstitch-trt", standalone_mode=False, obj=caught)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except click.exceptions.Exit as stop:
            return stop.exit_code
        except click.exceptions.NoArgsIsHelpError as no_args:
            click.echo(no_args.ctx.get_help() if no_args.ctx else "", err=True)
            return 2
        except BrokenPipeError:  # the reader of our stdout (`head`) went away: click's own code for it, no message
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 1
        except (click.Abort, KeyboardInterrupt):
            return _interrupted(signal.SIGINT)
        except SystemExit:
            if not caught:
                raise
            return _interrupted(caught[0])
        except Exception as error:
            if developer:
                import traceback

                traceback.print_exc()
            if caught:
                return _interrupted(caught[0])
            failure = as_failure(error)
            print_failure(failure)
            return failure.exit_code


def _interrupted(number: int) -> int:
    click.echo("interrupted" if number == signal.SIGINT else "terminated", err=True)
    return 128 + number
