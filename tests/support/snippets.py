"""Fenced code blocks of Markdown pages, and what can be checked of them without running them."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import yaml

__all__ = ["ROOT", "RUN", "Block", "blocks", "check", "is_skipped", "logical_lines", "without_blocks"]

ROOT = Path(__file__).parents[2]
# Why a block is not run, as its title: readers see it.
NEEDS = {f"Needs {what}" for what in ("a GPU", "a cluster", "a network", "published weights", "Triton")}
RUN = ("sh", "python")
_SHOWN = (
    "text", "c", "cpp", "cmake", "csv", "diff", "dockerfile", "html", "http", "ini", "latex", "markdown",
    "nginx",
)  # fmt: skip
_FENCE = re.compile(r'^( *)```(\w*)(?: title="([^"]*)")?([^\n]*)\n(.*?)^\1``` *$', re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"[\w-]+\.(?:toml|json|yaml|txt|csv)")
# Set the machine up, or take what is not in the folder of a page: named files, extras and targets are checked.
_NOT_RUN = re.compile(
    r"(?:sudo )?(?:pip|python3? -m pip|git|make|apt|apt-get|pytest|cmake|ctest|\.ci/run|cd|source|\.|python3? -m venv"
    r"|python3? (?:benchmarks|examples)/\S+)(?: |$)"
)


@dataclass(frozen=True)
class Block:
    """``line``: of its first line in the page, from 1. ``text``: without the fence's indentation."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in RUN and not self.title

    @property
    def file(self) -> str | None:
        """The file that the block is the content of: its title, if that is a file name."""
        return self.title if self.language not in RUN and _FILE.fullmatch(self.title) else None


def blocks(path: Path) -> list[Block]:
    text = path.read_text()
    page = path.relative_to(ROOT).as_posix()
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        assert not match[4].strip(), (
            f"{page}:{line - 1}: only a title may follow the language, got {match[4].strip()!r}"
        )
        found.append(Block(page, line, match[2], match[3] or "", textwrap.dedent(match[5])))
    return found


def without_blocks(text: str) -> str:
    return _FENCE.sub("", text)


def check(block: Block) -> None:
    """Titles, syntax, options of the command line, names of the Python packages, extras, targets."""
    place = block.place
    if block.language in RUN:
        assert block.title in {"", *NEEDS}, f"{place}: title {block.title!r}; allowed are {sorted(NEEDS)}"
    match block.language:
        case "sh":
            _check_shell(block)
        case "console":  # commands after "$ ", and what they print
            lines = [line.removeprefix("$ ") if line.startswith("$ ") else "" for line in block.text.splitlines()]
            _check_shell(replace(block, text="\n".join(lines)))
        case "python":
            _check_python(block)
        case "json":
            json.loads(block.text)
        case "toml":
            tomllib.loads(block.text)
        case "yaml":
            list(yaml.safe_load_all(block.text))
        case language:
            assert language in _SHOWN, f"{place}: language {language!r}; allowed are {', '.join((*RUN, *_SHOWN))}"


def is_skipped(command: str) -> bool:
    """Whether a line of ``sh``, or what stands before ``&&`` in it, is checked only."""
    return _NOT_RUN.match(command) is not None


def logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """(index of the first line, command): lines that end in ``\\`` are joined to the next, comments left out."""
    pending, start = "", 0
    for index, line in enumerate(text.splitlines()):
        start = start if pending else index
        if line.endswith("\\"):
            pending += line[:-1]
            continue
        command = re.sub(r"(^|\s)#\s.*", "", pending + line).strip()
        pending = ""
        if command:
            yield start, command


def _check_shell(block: Block) -> None:
    for index, line in logical_lines(block.text):
        place = f"{block.page}:{block.line + index}"
        line = re.sub(r"\s\d?(?:>>?|<)&?\s*[^\s<>]+", " ", line)  # redirections
        words_of = shlex.shlex(line, posix=True, punctuation_chars=";|&()")
        words_of.whitespace_split = True
        try:
            words = list(words_of)
        except ValueError:  # a text over several lines
            assert "tstitch-trt" not in line, f"{place}: a text over several lines can't be checked: {line}"
            continue
        commands: list[list[str]] = [[]]
        for word in words:
            if re.fullmatch(r"[;|&()]+", word):
                commands.append([])
            else:
                commands[-1].append(word)
        for command in commands:
            _check_command(command, place)


def _check_command(words: list[str], place: str) -> None:
    from tstitch_trt.cli import COMMANDS

    for index, word in enumerate(words):
        first = all("=" in before for before in words[:index])  # but for variables
        if word == "tstitch-trt" and (first or (words[index + 1 : index + 2] and words[index + 1] in COMMANDS)):
            _check_options(words[index + 1 :], place)
            return
    if "pip" in words[:3] and "install" in words:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in words:
            if match := re.fullmatch(r"(?:\.|tstitch-trt)\[([\w,-]+)\]", word):
                unknown = set(match[1].split(",")) - set(extras)
                assert not unknown, f"{place}: no such extras: {', '.join(unknown)}"
    elif words[:1] == ["make"]:
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"{place}: {shlex.join(words)}: the Makefile has {', '.join(targets)}"
    elif words[:1] in (["python"], ["python3"], ["pytest"]):
        files = [word.partition("::")[0] for word in words if re.match(r"(?:benchmarks|examples|tests)/\S+\.py", word)]
        assert all((ROOT / file).exists() for file in files), f"{place}: {shlex.join(words)}: no such file"


def _check_options(words: list[str], place: str) -> None:
    from tstitch_export.planning.recipe import load_recipe, recipe_names
    from tstitch_trt.cli import cli

    assert isinstance(cli, click.Group)
    try:
        context = click.Context(cli, info_name="tstitch-trt", **cli.context_settings)
        if not words or words[0].startswith("-"):
            cli.make_context("tstitch-trt", list(words) or ["--help"])
            return
        command = cli.get_command(context, words[0])
        assert command is not None, f"{place}: no such command: tstitch-trt {words[0]}"
        made = command.make_context(words[0], list(words[1:]), parent=context)
    except click.exceptions.Exit:
        return  # --help, --version
    except click.ClickException as error:
        raise AssertionError(f"{place}: tstitch-trt {shlex.join(words)}: {error.format_message()}") from None
    if words[0] == "build" and made.params["source"] in recipe_names():
        recipe, _ = load_recipe(made.params["source"])
        members = {text.partition("=")[0] for text in made.params["members"]}
        parts = {text.partition("=")[0] for text in made.params["parts"]}
        others = members if recipe.other_members else set()
        assert (
            members - others
            <= recipe.members.keys()
            <= members | {name for name, member in recipe.members.items() if member.checkpoint}
        ), f"{place}: {made.params['source']} has the members {', '.join(recipe.members)}"
        assert parts <= recipe.parts.keys(), f"{place}: {made.params['source']} has the parts {', '.join(recipe.parts)}"


def _check_python(block: Block) -> None:
    try:
        tree = ast.parse(block.text)
    except SyntaxError as error:
        raise AssertionError(f"{block.place}: {error}") from None
    for node in ast.walk(tree):
        names: list[tuple[str, str]] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [(node.value.id, node.attr)]
        for module, name in names:
            if re.match(r"tstitch_(?:trt|export|engines)\b", module):
                found = importlib.import_module(module)
                line = block.line + node.lineno - 1  # type: ignore[attr-defined]
                assert hasattr(found, name), f"{block.page}:{line}: {module} has no {name}"
