"""``tstitch-trt config``: the defaults of this user, where each is from, and a file to begin with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from tstitch_engines.errors import BadInput, nearest
from tstitch_trt.cli._command import option, tstitch_command
from tstitch_trt.cli._defaults import (
    PREFIX,
    SHARED,
    VARIABLES,
    DefaultsFile,
    config_path,
    converted,
    option_key,
    read_environment,
    settable,
    variables_of,
)

__all__ = ["command", "every_command"]

Value = str | int | float | bool | list[str]

EXAMPLES = """
tstitch-trt config
tstitch-trt config --json
tstitch-trt config --template
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    template: bool = option("Print a file with every option that may stand in it, as comments.")


@tstitch_command("config", EXAMPLES, bundle=False, options=Options)
def command(options: Options, as_json: bool) -> None:
    """Show which file of defaults is read, and what it and the environment set. Checks all of it.

    The file is $TSTITCH_TRT_CONFIG, else ~/.config/tstitch-trt/config.toml ($XDG_CONFIG_HOME). The command line comes
    before the environment, the environment before the file.
    """
    from tstitch_trt.cli._text import print_json, print_table

    if options.template:
        click.echo("\n".join(_template()))
        return
    path, file = config_path(), DefaultsFile.read()
    values = list(_values(file))
    variables = {
        name: "(set)" if name.endswith("PASSPHRASE") else os.environ[name] for name in VARIABLES if name in os.environ
    }
    if as_json:
        from tstitch_trt.cli._documents import ConfigOutput, SetOption

        shown_values = [SetOption(command=c, option=o, value=v, source=s) for c, o, v, s in values]
        document = ConfigOutput(
            file=None if path is None else str(path),
            exists=file is not None,
            values=shown_values,
            variables=variables,
        )
        print_json(document)
        return
    click.echo(f"file: {path or 'none'}{'' if file is not None or path is None else ' (does not exist)'}")
    for name, value in variables.items():
        click.echo(f"{name}={value}")
    if values:
        click.echo()
        print_table(("command", "option", "value", "from"), [(c, o, str(v), s) for c, o, v, s in values])


def every_command() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All commands by path: ``("sample",)``, ``("cache", "prune")``. Groups come before what is in them."""
    from tstitch_trt.cli import cli

    def below(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
        context = click.Context(group)
        for name in group.list_commands(context):
            found = group.get_command(context, name)
            assert found is not None
            yield (*path, name), found
            if isinstance(found, click.Group):
                yield from below(found, (*path, name))

    assert isinstance(cli, click.Group)
    return below(cli, ())


def _values(file: DefaultsFile | None) -> Iterator[tuple[str, str, Value, str]]:
    """Command, option, value and source. Raises ``BadInput`` for what is wrong in any of them."""
    commands = dict(every_command())
    if file is not None:
        file.check_tables([path[0] for path in commands if len(path) == 1])
    known = set(VARIABLES)
    for path, found in commands.items():
        defaults = {} if file is None else file.defaults(found, path)
        if not isinstance(found, click.Group):
            read_environment(found, path)
        variables = variables_of(found, path)
        known |= set(variables)
        by_key = {option_key(each): name for name, each in variables.items() if os.environ.get(name)}
        for key, each in settable(found).items():
            if key in by_key:
                value, source = os.environ[by_key[key]], f"${by_key[key]}"
                converted(each, value, source)
                yield " ".join(path), key, value, source
            elif each.name in defaults:
                value = defaults[each.name]
                yield " ".join(path), key, str(value) if isinstance(value, Path) else value, "file"
    for name in os.environ:
        if name.startswith(PREFIX) and name not in known:
            close = nearest(name, known)
            raise BadInput(
                f"${name} belongs to no command",
                hint=f"did you mean {close}?" if close else "unset it",
            )


def _template() -> Iterator[str]:
    yield "# Defaults of tstitch-trt. Remove the # before a line to set an option. tstitch-trt config checks the file."
    yield ""
    yield "[all]"
    shared = {key: each for _, found in every_command() for key, each in settable(found).items() if key in SHARED}
    for key in SHARED:
        yield from _entry(shared[key])
    for path, found in every_command():
        own = [each for key, each in settable(found).items() if key not in SHARED]
        if own and not isinstance(found, click.Group):
            yield ""
            yield f"[{'.'.join(path)}]"
            for each in own:
                yield from _entry(each)


def _entry(setting: click.Option) -> Iterator[str]:
    yield f"# {setting.help}"
    yield f"# {option_key(setting)} = {_example(setting)}"


def _example(setting: click.Option) -> str:
    """A value of the right type: the default, where there is one."""
    kind, default = setting.type, setting.default
    if setting.is_flag:
        return "true"
    if setting.multiple:
        return f'["{setting.metavar}"]'
    if isinstance(default, int | float):
        return str(default)
    if isinstance(kind, click.types.IntParamType):
        return str(getattr(kind, "min", None) or 1)
    if isinstance(kind, click.types.FloatParamType):
        return "1.0"
    if isinstance(default, str | Path):
        return f'"{default}"'
    if isinstance(kind, click.Choice):
        return f'"{kind.choices[0]}"'
    return f'"{setting.metavar}"'
