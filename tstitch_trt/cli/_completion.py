"""What the shell offers after TAB. Nothing here raises: an incomplete command line is no error.

bash puts what it is given on the command line as it is. Names that it would read as something else are not offered:
those with spaces, and what a foreign bundle calls its classes, such as ``$(reboot)``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, get_args

import click
from click.shell_completion import CompletionItem

__all__ = ["COMPLETERS", "Complete", "complete_bundle", "complete_recipe"]

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def complete_bundle(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders with a manifest; where there are none, any folder, to look further down."""
    name, _, start = incomplete.rpartition("=")  # serve takes NAME=BUNDLE
    prefix = f"{name}=" if name else ""
    found = sorted(f"{start}{path.name.removeprefix(Path(start + '_').name[:-1])}" for path in _folders(start))
    if found and all(map(_is_plain, found)):
        return [CompletionItem(prefix + path) for path in found]
    return [CompletionItem(incomplete, type="dir")]  # the shell's own, which quotes


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"~?[\w@%+=:,./-]*", name) is not None


def _folders(start: str) -> list[Path]:
    parent, stem = Path(f"{start}_").parent, Path(f"{start}_").name[:-1]
    try:
        return [path for path in parent.iterdir() if path.name.startswith(stem) and (path / "manifest.json").is_file()]
    except OSError:
        return []


def complete_recipe(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The recipes that come with the package, else files."""
    from tstitch_export.planning.recipe import recipe_names

    found = [CompletionItem(name) for name in recipe_names() if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def _one_of(names: Callable[[], Iterable[str]]) -> Complete:
    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in names() if name.startswith(incomplete)]

    return complete


def _manifest() -> Mapping[str, Any]:
    """Of the first word that is a bundle: click parses nothing where the last option lacks its value."""
    from tstitch_engines.bundle.read import MANIFEST_BYTES, read_json

    words = click.shell_completion.split_arg_string(os.environ.get("COMP_WORDS", ""))
    files = [Path(word).expanduser() / "manifest.json" for word in words]
    found: Mapping[str, Any] = read_json(next(file for file in files if file.is_file()), MANIFEST_BYTES)
    return found


def _listed(names: Callable[[Mapping[str, Any]], Iterable[str]]) -> Complete:
    """``names`` of the bundle's manifest, for the last entry of a list with commas."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        try:
            found = [name for name in names(_manifest()) if name.startswith(last) and _is_plain(name)]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, StopIteration):  # no bundle
            return []
        return [CompletionItem(before + comma + name) for name in found]

    return complete


def _solvers() -> Iterable[str]:
    from tstitch_trt.solvers.registry import SOLVERS

    return SOLVERS


def _backends() -> Iterable[str]:
    from tstitch_engines.backends import BACKENDS

    return BACKENDS


def _roundings() -> Iterable[str]:
    from tstitch_trt.plan.schedule import ROUNDINGS

    return ROUNDINGS


def _choices(name: str) -> Complete:
    def names() -> Iterable[str]:
        from tstitch_trt.solvers.options import CHOICES

        return CHOICES[name]

    return _one_of(names)


def _precisions() -> Iterable[str]:
    from tstitch_engines.bundle.manifest import Precision

    return get_args(Precision)


COMPLETERS: Final[Mapping[str, Complete]] = {
    "--backend": _one_of(_backends),
    "--device": _one_of(lambda: ("cpu", "cuda")),
    "--history": _one_of(lambda: ("keep", "reset")),
    "--labels": _listed(lambda manifest: manifest["conditioning"]["names"]),
    "--members": _listed(lambda manifest: manifest["members"]),
    "--precision": _one_of(_precisions),
    "--rounding": _one_of(_roundings),
    "--schedule": _listed(lambda manifest: manifest["members"]),
    "--sigmas": _choices("sigmas"),
    "--solver": _one_of(_solvers),
    "--spacing": _choices("spacing"),
    "--variance": _choices("variance"),
}
"""By option, where the option is a text."""
