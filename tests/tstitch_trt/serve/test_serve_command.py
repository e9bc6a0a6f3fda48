"""``tstitch-trt serve`` as its operator has it: a process, its signals, its log and its metrics."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.command import Command, refused

KEY = "a-key-of-the-tests"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def test_what_can_not_be_served_is_refused_before_anything_is_loaded(
    run: Command, fashion_bundle: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(run("serve", fashion_bundle, "--port", port), f"127.0.0.1:{port}", "--port 0")
    for host in ("0.0.0.0", "::", "10.0.0.1"):  # noqa: S104
        refused(run("serve", fashion_bundle, "--host", host), host, "--api-key-file", "--insecure")
    short = tmp_path / "keys.txt"
    short.write_text("# none of 16 characters\nshort\n")
    assert "short" not in run("serve", fashion_bundle, "--api-key-file", short).err.replace("keys.txt", "")
    refused(run("serve", fashion_bundle, "--api-key-file", short), "line 2")
    refused(run("serve", fashion_bundle, fashion_bundle), "both called", "NAME=")
    refused(run("serve", fashion_bundle, "--weight", "other=2"), "other", "fashion")
    refused(run("serve", fashion_bundle, "--weight", "fashion=x"), "weight")
    refused(run("serve", fashion_bundle, "--root-path", "images"), "root_path")
    refused(run("serve", fashion_bundle, "--max-steps", "0"), "--max-steps")
    refused(run("serve", fashion_bundle, "--max-body", "much"), "much", "--max-body")
    refused(run("serve", tmp_path / "none.bundle"), "none.bundle")
    refused(run("serve"), "BUNDLE")


def test_without_the_extra_it_is_refused_by_name(fashion_bundle: Path) -> None:
    for missing in ("fastapi", "uvicorn", "prometheus_client"):
        script = (
            f"import sys; sys.modules[{missing!r}] = None\n"
            "from tstitch_trt.cli import main; sys.exit(main(sys.argv[1:]))"
        )
        words = [sys.executable, "-c", script, "serve", str(fashion_bundle), "--port", "0"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "tstitch-trt[serve]" in done.stderr
