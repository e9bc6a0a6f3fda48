"""A front as a child process, and requests sent to it at their times, whatever became of the ones before."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray

from servingbench.asks import Ask
from servingbench.figures import Counters, Usage
from servingbench.front import Setup
from tstitch_engines.errors import FailedWork

__all__ = ["Answer", "Client"]

_START_SECONDS = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """``pictures``: uint8 ``[N,H,W,C]``. ``latency``: seconds from the time the request was to be sent."""

    latency: float
    pictures: NDArray[np.uint8] | None = None
    counters: Counters | None = None
    error: str | None = None


class _Body(msgspec.Struct, frozen=True):
    shape: tuple[int, int, int, int]
    pixels: str
    counters: Counters


class Client:
    """The front of one contender, in a process group of its own. Close it.

    ``counters``: the newest that an answer had. ``log``: what its processes print.
    """

    def __init__(self, setup: Setup, log: Path) -> None:
        """Raises ``FailedWork`` where it does not start."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.name = setup.contender
        self._url = f"http://127.0.0.1:{port}"
        self.log = log
        self.counters = Counters()
        paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(setup.threads)}
        command = [sys.executable, "-m", "servingbench.front", msgspec.json.encode(setup).decode(), str(port)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, process_group=0
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until and self._process.poll() is None:
            try:
                if httpx.get(f"{self._url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        said = self.log.read_text(errors="replace").strip()[-2000:]
        raise FailedWork(f"the front of {self.name} does not start: {said}", hint=f"read {self.log}")

    def close(self) -> None:
        for number in (signal.SIGCONT, signal.SIGTERM):
            self._signal(number)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._signal(signal.SIGKILL)  # its workers too
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    @contextmanager
    def running(self) -> Iterator[Client]:
        """Within the block its processes run; else they are stopped and take no time from others."""
        self._signal(signal.SIGCONT)
        try:
            yield self
        finally:
            self._signal(signal.SIGSTOP)

    def usage(self) -> Usage:
        """Of all its processes."""
        cpu, peak = 0, 0
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == self._process.pid:
                    cpu += sum(int(field) for field in fields[11:15])  # user, system, and of children that ended
                    status = (folder / "status").read_text()
                    peak += 1024 * int(status.partition("VmHWM:")[2].split()[0])
            except (OSError, IndexError):  # it has just ended
                continue
        return Usage(cpu_seconds=cpu / _TICKS, peak_bytes=peak)

    def send(self, asks: Sequence[Ask], patience: float = 60.0) -> list[Answer]:
        """Sends each request at its time and waits for all, for each at most ``patience`` seconds."""
        answers = asyncio.run(self._send(asks, patience))
        known = [answer.counters for answer in answers if answer.counters is not None]
        self.counters = max([self.counters, *known], key=lambda counters: counters.calls)
        return answers

    async def _send(self, asks: Sequence[Ask], patience: float) -> list[Answer]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        headers = {"content-type": "application/json"}
        async with httpx.AsyncClient(base_url=self._url, timeout=patience, limits=limits, headers=headers) as http:
            await http.get("/health")  # the first connection is made before the clock runs
            loop = asyncio.get_running_loop()
            start = loop.time()

            async def one(ask: Ask) -> Answer:
                await asyncio.sleep(start + ask.at - loop.time())
                try:
                    reply = await http.post("/predict", content=msgspec.json.encode(ask))
                except httpx.TransportError as error:
                    return Answer(latency=loop.time() - start - ask.at, error=type(error).__name__)
                return _answer(reply, loop.time() - start - ask.at)

            return list(await asyncio.gather(*map(one, asks)))


def _answer(reply: httpx.Response, latency: float) -> Answer:
    if reply.status_code != 200:
        return Answer(latency=latency, error=f"HTTP {reply.status_code}")
    body = msgspec.json.decode(reply.content, type=_Body)
    pictures: Any = np.frombuffer(base64.b64decode(body.pixels), np.uint8).reshape(body.shape)
    return Answer(latency=latency, pictures=pictures, counters=body.counters)
