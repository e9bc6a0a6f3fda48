"""``tstitch-trt doctor``: what this machine can build and run."""

from __future__ import annotations

import click

from tstitch_trt.cli._command import tstitch_command

__all__ = ["command"]

EXAMPLES = """
tstitch-trt doctor
tstitch-trt doctor --json
"""


@tstitch_command("doctor", EXAMPLES, bundle=False)
def command(as_json: bool) -> int:
    """Show what this machine can build and run. For what it can't, show why and how to fix it.

    For NVIDIA GPUs: the driver and the newest CUDA that it runs, whether the installed packages are for that CUDA and
    the step kernels for these GPUs, and which backends run on them.

    The exit code is 0 when the built-in pair can be built and run here, else 1.
    """
    from tstitch_trt.cli._text import print_json
    from tstitch_trt.doctor import examine

    found = examine()
    if as_json:
        print_json(found)
        return 0 if found.usable else 1
    machine = found.machine
    click.echo(f"{machine.processor}, {machine.cores} cores, {machine.memory_bytes / 2**30:.1f} GiB, {machine.system}")
    click.echo(f"tstitch-trt {machine.versions['tstitch-trt']}, Python {machine.python}")
    group = ""
    for check in found.checks:
        if check.group != group:
            group = check.group
            click.echo(f"\n{group}")
        click.echo(f"  {'ok ' if check.ok else 'no '} {check.name:<24} {check.detail}")
        if not check.ok and check.hint:
            click.echo(f"      {'':<24} hint: {check.hint}")
    click.echo()
    click.echo("The built-in pair can be built and run here." if found.usable else "The built-in pair can't run here.")
    click.echo(f"On the GPU run: {', '.join(found.on_gpu)}." if found.on_gpu else "No backend runs on a GPU here.")
    return 0 if found.usable else 1
