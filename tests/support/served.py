"""``tstitch-trt serve`` as a process of its own, and a client of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

__all__ = ["Served", "served"]


class Served:
    """``lines``: of its log that are written to their end, as JSON."""

    def __init__(self, address: str, process: subprocess.Popen[str], log: Path, key: str | None) -> None:
        self.address = address
        self.process = process
        self._log = log
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.client = httpx.Client(base_url=address, timeout=60, headers=headers)

    @property
    def lines(self) -> list[dict[str, Any]]:
        whole = self._log.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    @property
    def messages(self) -> list[str]:
        return [line["message"] for line in self.lines if "message" in line]

    def told(self) -> str:
        """The log without its requests that succeeded, for messages of tests."""
        lines = self.log.splitlines()
        return "\n".join(line for line in lines if '"status": 200' not in line)[-4000:]

    @property
    def log(self) -> str:
        return self._log.read_text()

    def draw(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/images/generations", json={"n": 1, "steps": 4, "seed": 0, **body})

    def ready(self) -> int:
        return self.client.get("/readyz").status_code

    def until(self, holds: Callable[[], bool], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.told()
            assert self.process.poll() is None, self.told()
            time.sleep(0.02)

    def metrics(self) -> dict[str, float]:
        """Samples by their name and labels as the page has them."""
        page = self.client.get("/metrics").text
        rows = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in rows}


@contextmanager
def served(
    *bundles: str | Path,
    log: Path,
    options: tuple[str, ...] = (),
    key: str | None = None,
    environment: dict[str, str] | None = None,
    program: tuple[str, ...] = ("-m", "tstitch_trt.cli"),
) -> Iterator[Served]:
    """A server that has bound its port; it may still be loading. ``program``: what Python runs."""
    words = [sys.executable, *program, "serve", *map(str, bundles), "--port", "0", "--threads", "1",
             "--log-format", "json", *options]  # fmt: skip
    with log.open("w") as errors:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:"), log.read_text()
        server = Served(address, process, log, key)
        with server.client:
            yield server
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
