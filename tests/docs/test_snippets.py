"""Every snippet of README.md and docs/ runs, or its title says what it needs; those are held against the options.

A page's blocks run in the order of the page and in one folder, which has ``fashion.bundle``. ``sh`` blocks are given to
bash whole, ``python`` blocks to one process a page. ``tstitch-trt serve`` and ``ui`` stay up until the page ends, on
free ports that later blocks get in place of the ones they name. A block in another language whose title is a file name
is written to that file. Lines that install, build or fetch (``pip``, ``git``, ``make``, ``cmake``...) are checked only.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.snippets import ROOT, Block, blocks, check, is_skipped, logical_lines, without_blocks
from tstitch_trt.cli import cli

RUN = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# For a clone.
CHECKED = [
    *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "engines", "examples")),
]
SECONDS = 300  # that a block may take
# What blocks import that is not there on every machine: the page is skipped.
REQUIRES = {"docs/how-to/gpu.md": "tensorrt_rtx_bindings"}
# The last of two options counts.
FEWER = {"tstitch-trt demo": "--samples 10 --steps 4"}
# No snippet needs more than this machine, whatever is there where the tests run.
_NOWHERE = "http://127.0.0.1:9"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), _NOWHERE),
    **dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost"),
}
PYTHON = """
import json, sys, traceback
answers, names = sys.stdout, {"__name__": "__main__"}
sys.stdout = sys.stderr
for line in sys.stdin:
    place, code = json.loads(line)
    try:
        exec(compile(code, place, "exec"), names)
    except BaseException:
        traceback.print_exc()
        print("failed", file=answers, flush=True)
    else:
        print("done", file=answers, flush=True)
"""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", CHECKED + RUN, ids=name_of)
def test_snippets_are_right(path: Path) -> None:
    for block in blocks(path):
        check(block)
    rest = without_blocks(path.read_text())
    indented = re.findall(r"^ {4,}(?:tstitch-trt|python|pip) .*", rest, re.MULTILINE)
    assert not indented, f"{name_of(path)}: commands that are no fenced block are not checked: {indented}"
    fences = re.findall(r"^[ >]*(?:```|~~~).*", rest, re.MULTILINE)
    assert not fences, f"{name_of(path)}: fences that are not read as blocks: {fences}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", [path for path in RUN if any(block.runs for block in blocks(path))], ids=name_of)
def test_snippets_run(path: Path, tmp_path: Path, fashion_bundle: Path) -> None:
    if module := REQUIRES.get(name_of(path)):
        pytest.importorskip(module, reason="TensorRT-RTX is not installed")
    shutil.copytree(fashion_bundle, tmp_path / "fashion.bundle")
    with PageRun(tmp_path) as page:
        for block in blocks(path):
            page.run(block)


def snippet(language: str, text: str, title: str = "") -> Block:
    return Block("page.md", 3, language, title, text)


@pytest.mark.parametrize(
    ("language", "text", "told"),
    [
        ("sh", "true\ntstitch-trt none\n", "page.md:4: no such command"),
        ("sh", "FOO=1 tstitch-trt sample \\\n  x --none\n", "No such option '--none'"),
        ("sh", "cd x && tstitch-trt sample x --steps many\n", "'many' is not a valid integer"),
        ("sh", "docker run x tstitch-trt serve --none\n", "No such option"),
        ("sh", "tstitch-trt build sd15-bksdm-tiny --member none=x -o y\n", "sd15-bksdm-tiny has the members"),
        ("sh", "tstitch-trt sample x --prompt 'a\nb'\n", "over several lines"),
        ("sh", "pip install '.[none]'\n", "no such extras: none"),
        ("sh", "make none\n", "the Makefile has"),
        ("sh", "python benchmarks/none.py\n", "no such file"),
        ("console", "$ tstitch-trt none\n", "no such command"),
        ("python", "x =\n", "invalid syntax"),
        ("python", "import tstitch_trt\ntstitch_trt.none\n", "page.md:4: tstitch_trt has no none"),
        ("python", "from tstitch_trt import none\n", "tstitch_trt has no none"),
        ("json", "{", "line 1"),
        ("toml", "a =", "Invalid value"),
        ("yaml", "a: [", "flow node"),
        ("bash", "true\n", "language 'bash'"),
    ],
)
def test_a_wrong_snippet_is_refused(language: str, text: str, told: str) -> None:
    titles = ("", "Needs a GPU") if language in ("sh", "python") else ("",)
    for title in titles:
        with pytest.raises((AssertionError, ValueError, yaml.YAMLError)) as refused:
            check(snippet(language, text, title))
        assert told in str(refused.value)


def test_a_title_that_is_no_reason_is_refused() -> None:
    with pytest.raises(AssertionError, match="'Needs luck'; allowed are"):
        check(snippet("sh", "true\n", "Needs luck"))


@pytest.mark.parametrize(
    ("language", "text", "told"),
    [
        ("sh", "true\nls nothing-here\necho after\n", "failed: line 4: ls nothing-here"),
        ("sh", "false | true\n", "exit code 1"),
        ("sh", "echo $NOT_SET\n", "NOT_SET: unbound variable"),
        ("sh", "echo before\nsleep 600 & sleep 601\n", "runs for more than 1 s"),
        ("sh", "tstitch-trt serve no.bundle\n", "does not listen"),
        ("python", "x = 1\nx.none\n", 'File "page.md", line 4'),
        ("python", "raise SystemExit(0)\n", "SystemExit"),
        ("python", "import time\ntime.sleep(602)\n", "runs for more than 1 s"),
    ],
)
def test_a_snippet_that_fails_or_hangs_is_named_and_leaves_nothing(
    language: str, text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "600" in text or "602" in text:
        monkeypatch.setattr(sys.modules[__name__], "SECONDS", 1)
    with pytest.raises(pytest.fail.Exception) as failed, PageRun(tmp_path) as page:
        page.run(snippet(language, text))
    assert told in str(failed.value)
    assert "page.md:3" in str(failed.value)
    _require_none_in(tmp_path)


def _require_none_in(folder: Path) -> None:
    """Who was killed is there for a moment."""
    end = time.monotonic() + 20
    while any(_is_in(entry, folder) for entry in Path("/proc").glob("[0-9]*/cwd")):
        assert time.monotonic() < end, "a process is left"
        time.sleep(0.02)


def _is_in(cwd: Path, folder: Path) -> bool:
    """Whether a process of ours runs in ``folder``: it may end while it is looked at, and others can't be read."""
    with suppress(OSError):
        return cwd.resolve() == folder.resolve() and b"State:\tZ" not in (cwd.parent / "status").read_bytes()
    return False


def test_what_a_snippet_leaves_in_the_background_ends_with_its_block(tmp_path: Path) -> None:
    with PageRun(tmp_path) as page:
        page.run(snippet("sh", "sleep 603 &\n"))
        _require_none_in(tmp_path)


class PageRun:
    """One page's folder, its Python process and its servers. A failure names the page, the line, command and output."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self._environment = {**os.environ, **OFFLINE, "PATH": path, "MPLBACKEND": "agg", "PYTHONUNBUFFERED": "1"}
        self._python: subprocess.Popen[str] | None = None
        self._servers: dict[int, tuple[subprocess.Popen[bytes], int, Block, Path]] = {}  # by the port that pages name

    def __enter__(self) -> PageRun:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if self._python is not None:
                assert self._python.stdin is not None
                assert self._python.stdout is not None
                self._python.stdin.close()
                _wait(self._python, 0 if kind else 60)
                self._python.stdout.close()
        finally:
            for port in list(self._servers):
                self._end(port, quietly=kind is not None)

    def run(self, block: Block) -> None:
        if block.file is not None:
            (self._folder / block.file).write_text(block.text)
        elif block.runs:
            if block.language == "python":
                self._run_python(block, self._with_ports(block.text))
            else:
                self._run_shell(block)

    def _run_shell(self, block: Block) -> None:
        lines = block.text.splitlines()
        starts = [*logical_lines(block.text)]
        kept = [*lines]
        begin = 0
        for place, (index, command) in enumerate(starts):
            end = starts[place + 1][0] if place + 1 < len(starts) else len(lines)
            rest = command
            while is_skipped(rest):
                _, _, rest = (part.strip() for part in rest.partition("&&"))
            for start, fewer in FEWER.items():
                if rest.startswith(start):
                    rest = f"{rest} {fewer}"
            if match := re.match(r"(?:\w+=\S+ )*tstitch-trt (serve|ui)\b(?!.*--help)", rest):
                self._bash(block, [""] * begin + kept[begin:index])
                self._start(block, rest.rstrip("& "), match[1])
                begin = end
                kept[index:end] = [""] * (end - index)
            elif rest != command:
                kept[index:end] = [rest] + [""] * (end - index - 1)
        self._bash(block, [""] * begin + kept[begin:])

    def _bash(self, block: Block, lines: list[str]) -> None:
        if not any(lines):
            return
        text = self._with_ports("\n".join(lines))
        say = "trap 'echo \"failed: line $((LINENO + OFFSET)): $BASH_COMMAND\" >&2' ERR; "
        output = self._folder / ".bash.txt"  # a file: what runs on in the background would keep a pipe open
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-Eeuo", "pipefail", "-c", say + text], cwd=self._folder,
                env={**self._environment, "OFFSET": str(block.line - 1)},
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        ended = _wait(process, SECONDS)
        if process.returncode:
            how = f"exit code {process.returncode}" if ended else f"runs for more than {SECONDS} s"
            pytest.fail(f"{block.place}: {how}\n{text.strip()}\n\n{output.read_text()[-4000:]}{self._told()}")

    def _run_python(self, block: Block, text: str) -> None:
        output = self._folder / ".python.txt"
        if self._python is None:
            with output.open("w") as errors:
                self._python = subprocess.Popen(
                    [sys.executable, "-c", PYTHON], cwd=self._folder, env=self._environment, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
                )  # fmt: skip
        assert self._python.stdin is not None
        assert self._python.stdout is not None
        code = "\n" * (block.line - 1) + text
        print(json.dumps([block.page, code]), file=self._python.stdin, flush=True)
        answered, _, _ = select.select([self._python.stdout], [], [], SECONDS)
        if not answered or self._python.stdout.readline() != "done\n":
            how = "" if answered else f": runs for more than {SECONDS} s"
            pytest.fail(f"{block.place}{how}\n{text}\n{output.read_text()[-4000:]}{self._told()}")

    def _start(self, block: Block, command: str, name: str) -> None:
        port = _port(command, name)
        if port in self._servers:
            self._end(port)
        free = _free_port()
        log = self._folder / f".{name}-{port}.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"{command} --port {free}"], cwd=self._folder, env=self._environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self._servers[port] = process, free, block, log
        end = time.monotonic() + SECONDS
        while not _answers(free, "/readyz" if name == "serve" else "/"):
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"{block.place}: does not listen: {command}\n{log.read_text()[-4000:]}")
            time.sleep(0.05)

    def _end(self, port: int, *, quietly: bool = False) -> None:
        process, _, block, log = self._servers.pop(port)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        _wait(process, 60)
        code = process.returncode
        if code and not quietly:
            pytest.fail(f"{block.place}: the server ends with exit code {code} after Ctrl-C\n{log.read_text()[-4000:]}")

    def _with_ports(self, text: str) -> str:
        for port, (_, free, _, _) in self._servers.items():
            text = re.sub(rf"\b(127\.0\.0\.1|localhost):{port}\b", rf"\1:{free}", text)
        return text

    def _told(self) -> str:
        return "".join(f"\n{log.name}:\n{log.read_text()[-2000:]}" for _, _, _, log in self._servers.values())


def _wait(process: subprocess.Popen[Any], seconds: float) -> bool:
    """Whether it ended in time. It, and all that it left running, is gone afterwards."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    ended = process.returncode is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return ended


def _port(command: str, name: str) -> int:
    import click

    said = re.search(r"--port[ =](\d+)", command)
    if said:
        return int(said[1])
    assert isinstance(cli, click.Group)
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    (port,) = (parameter.default for parameter in found.params if parameter.name == "port")
    assert isinstance(port, int)
    return port


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _answers(port: int, path: str) -> bool:
    """Whether the server is ready for requests."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5):
            return True
    except OSError as error:  # an answer that is an error too
        return path == "/" and isinstance(error, urllib.error.HTTPError)
