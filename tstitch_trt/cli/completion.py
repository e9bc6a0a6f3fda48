"""``tstitch-trt completion``: the script that makes a shell complete commands, options and their values."""

from __future__ import annotations

import click

from tstitch_trt.cli._command import tstitch_command

__all__ = ["VARIABLE", "command"]

VARIABLE = "_TSTITCH_TRT_COMPLETE"  # what click tells the shell's request by

EXAMPLES = """
tstitch-trt completion bash
tstitch-trt completion zsh
tstitch-trt completion fish
"""


@tstitch_command("completion", EXAMPLES, bundle=False, json=False)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the script for SHELL.

    bash: keep it as ~/.local/share/bash-completion/completions/tstitch-trt. zsh: a line in ~/.zshrc, after compinit:
    eval "$(tstitch-trt completion zsh)". fish: keep it as ~/.config/fish/completions/tstitch-trt.fish.
    """
    from click.shell_completion import get_completion_class

    from tstitch_trt.cli import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "tstitch-trt", VARIABLE).source())
