"""A server under mixed load for a long time: every request answered, no lane lost, nothing that grows.

    python benchmarks/serving_soak.py --minutes 10                  # the built-in pair, built into build/fashion.bundle
    python benchmarks/serving_soak.py my.bundle --seconds 60 --clients 8

Starts ``tstitch-trt serve`` and plays clients drawn from the seed: whole answers and event streams, of requests with
different steps, fractions, solvers, guidance and numbers of images; 5 % that go away while they wait, 5 % that send
rubbish, and others that hang up in the middle of a body or a stream, or read it by the drop. A picture that arrives is
compared with the one ``Runtime.sample`` draws alone. Meanwhile the server's memory, descriptors and threads are
watched. At the end all that was accepted must have been answered or cancelled, every lane must be free, and a SIGTERM
must end the server with exit code 0. It stops at what is wrong. Writes ``serving-soak.json``, and exits with 1 where
anything was.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
from gpubench.script import parser_of, run_script
from numpy.typing import NDArray
from soak import Use, built_in, growth, quarters, told, use_now

import tstitch_trt
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.errors import BadInput, FailedWork
from tstitch_trt.progress import progress_bar

KINDS: Final = 24  # different requests
LEVELS: Final = 1  # of 255 that a pixel may differ by: the batch decides the order in which an engine adds
LARGE: Final = 1 << 20  # bytes of a body whose sender the server may cut off
PATIENCE: Final = 120.0  # seconds for one answer
SHARES: Final = {  # of the clients' requests, in percent
    "answer": 58, "stream": 20, "cancels": 5, "malformed": 5, "hangs up": 6, "reads slowly": 6,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", help="default: the built-in pair")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, help="in place of --minutes")
    parser.add_argument("--clients", type=int, default=24, help="at once (default 24)")
    parser.add_argument("--steps", type=int, default=20, help="of a request at most (default 20)")
    parser.add_argument("--max-lanes", type=int, default=16, help="of the server (default 16)")
    parser.add_argument("--max-queue", type=int, default=20, help="likewise: it is to be full at times (default 20)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the engines (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, default=Path("build"), help="for the server's log")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serving-soak.json")
    args = parser.parse_args(argv)
    return run_script(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    seconds = 60 * args.minutes if args.seconds is None else args.seconds
    if not 0 < seconds < 1e6 or not 1 <= args.clients <= 256 or not 1 <= args.steps <= 250:
        raise BadInput(
            f"{seconds:g} seconds, {args.clients} clients, {args.steps} steps; allowed are more than 0 seconds, 1 to "
            "256 clients and 1 to 250 steps",
            hint="e.g. --minutes 10 --clients 24 --steps 20",
        )
    bundle = args.bundle or built_in()
    asked = Asked.alone(bundle, args)
    log_path = args.scratch / "serving-soak.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with Server(bundle, args, log_path) as server:
        done = asyncio.run(Soak(server, asked, args.clients, args.seed).run(seconds))
        done["violations"] += server.end()
    command = "python benchmarks/serving_soak.py " + " ".join(sys.argv[1:])
    return told(
        args, {"command": command, "clients": args.clients, **done},
        f"{done['requests']} requests of {args.clients} clients in {done['seconds']:.0f} s, {done['pictures']} "
        "pictures compared",
    )  # fmt: skip


# --- what is asked for


Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Asked:
    """Requests as JSON, each with the pictures that it gives alone."""

    bodies: Sequence[Mapping[str, Any]]
    pictures: Sequence[Pictures]

    @staticmethod
    def alone(bundle: Path, args: argparse.Namespace) -> Asked:
        manifest = open_bundle(bundle).manifest
        if manifest.conditioning.kind != "class" or manifest.decoder.kind == "none":
            raise BadInput(
                f"the bundle {bundle} is asked for by {manifest.conditioning.kind}; allowed are bundles of classes "
                "with a decoder",
                hint="leave it out for the built-in pair",
            )
        rng = random.Random(args.seed)  # noqa: S311 - requests, not secrets
        bodies, pictures = [], []
        threads = args.threads if args.device == "cpu" else None
        with tstitch_trt.load(bundle, device=args.device, threads=threads, verify="size") as runtime:
            for _ in range(KINDS):
                n = rng.choice((1, 1, 2, 3))
                body: dict[str, Any] = {
                    "n": n,
                    "seed": rng.randrange(1 << 40),
                    "steps": rng.randint(min(2, args.steps), args.steps),
                    "fraction": rng.choice((0.0, 0.4, 0.7, 1.0)),
                    "solver": rng.choice(("ddim", "ddpm", "euler", "dpmpp-2m")),
                    "guidance": rng.choice((1.0, 1.0, 1.5)) if manifest.conditioning.guidable else 1.0,
                }
                labels = [rng.randrange(manifest.conditioning.classes) for _ in range(n)]
                bodies.append({**body, "class_labels": labels})
                found = runtime.sample(**body, labels=labels).images
                assert found is not None, "the bundle has a decoder"
                pictures.append(found)
        return Asked(bodies, pictures)


# --- the server


class Server:
    """``tstitch-trt serve`` as a child process."""

    def __init__(self, bundle: Path, args: argparse.Namespace, log_path: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log_path
        words = [bundle, "--port", self.port, "--device", args.device]
        words += ["--max-lanes", args.max_lanes, "--max-queue", args.max_queue]
        if args.device == "cpu":
            words += ["--threads", args.threads]
        with log_path.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tstitch_trt.cli", "serve", *map(str, words)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Server:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self._process.poll() is None:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return self
            time.sleep(0.1)
        self.__exit__()
        said = self._log.read_text(errors="replace").strip()[-2000:]
        raise FailedWork(f"the server does not start: {said}", hint=f"read {self._log}")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> list[str]:
        """Ends it by SIGTERM. Returns what is wrong with how it ended."""
        if self._process.poll() is not None:
            return [f"the server ended by itself with {self._process.returncode}"]
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(60)
        except subprocess.TimeoutExpired:
            return ["the server does not end within 60 s after SIGTERM"]
        return [] if code == 0 else [f"the server's exit code after SIGTERM is {code}"]

    def metrics(self) -> dict[str, float]:
        """Sample -> value; a sample is a name with its labels, as ``/metrics`` has it."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines if name}


# --- the clients


class Wrong(Exception):
    """What no client may see."""


@dataclass
class Soak:
    server: Server
    asked: Asked
    clients: int
    seed: int
    calls: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    pictures: int = 0

    async def run(self, seconds: float) -> dict[str, Any]:
        started = time.monotonic()
        self._until = started + seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.clients)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=PATIENCE, limits=limits) as self._http:
            workers = [asyncio.create_task(self._work(number)) for number in range(self.clients)]
            uses: list[Use] = []
            with progress_bar("soaking", counted="s") as bar:
                while time.monotonic() < self._until and not self.violations:
                    await asyncio.sleep(min(1.0, seconds / 100))
                    uses.append(use_now(started, self.server.pid))
                    bar.update(done=int(time.monotonic() - started), total=int(seconds) + 1)
            self._until = 0.0
            await asyncio.gather(*workers)
            if not self.violations:
                self.violations += growth(uses)
                await self._settled()
        return {
            "seconds": round(time.monotonic() - started, 1),
            "requests": self.calls.total(),
            "requests_by_client": dict(sorted(self.calls.items())),
            "answers": dict(sorted(self.answers.items())),
            "pictures": self.pictures,
            "violations": self.violations,
            "memory_bytes": [statistics.median(use.memory for use in part) for part in quarters(uses)],
            "uses": {"fields": Use._fields, "rows": [list(use) for use in uses[:: max(1, len(uses) // 200)]]},
        }

    async def _work(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")  # noqa: S311
        client = Client(self._http, self.server.port, self.asked, rng, self.answers)
        ways = client.ways()
        while time.monotonic() < self._until:
            (name,) = rng.choices(list(SHARES), weights=list(SHARES.values()))
            try:
                compared = await ways[name]()
            except Exception as error:
                self.violations.append(f"{name}: {type(error).__name__}: {error}")
                return
            self.calls[name] += 1
            self.pictures += compared
            if client.was_refused or rng.random() < 0.05:
                await asyncio.sleep(rng.uniform(0, 0.5))  # the load comes and goes

    async def _settled(self) -> None:
        """Nothing waits or runs any more, and all that was accepted has ended."""
        until = time.monotonic() + 30
        while True:
            found = await asyncio.to_thread(self.server.metrics)
            held = {
                name: value
                for name, value in found.items()
                if value and re.match(r"tstitch_(lanes|requests_in_flight|images_waiting|waiting_bytes)\{", name)
            }
            accepted, ended = (
                sum(value for name, value in found.items() if name.startswith(f"tstitch_requests_{what}_total"))
                for what in ("accepted", "finished")
            )
            if not held and accepted == ended > 0:
                return
            if time.monotonic() > until:
                self.violations.append(f"30 s after the last client: held {held}, accepted {accepted}, ended {ended}")
                return
            await asyncio.sleep(0.2)


@dataclass
class Client:
    """The requests of one client. ``answers`` counts what they were told."""

    http: httpx.AsyncClient
    port: int
    asked: Asked
    rng: random.Random
    answers: Counter[str]
    was_refused: bool = False  # by the newest answer

    def ways(self) -> dict[str, Callable[[], Awaitable[int]]]:
        """By the names of ``SHARES``. Each returns how many pictures were compared."""
        return {
            "answer": self.answer,
            "stream": self.stream,
            "cancels": self.cancels,
            "malformed": self.malformed,
            "hangs up": self.hangs_up,
            "reads slowly": self.reads_slowly,
        }

    def _draw(self) -> tuple[dict[str, Any], Pictures]:
        index = self.rng.randrange(len(self.asked.bodies))
        body = dict(self.asked.bodies[index])
        if self.rng.random() < 0.1:
            body["priority"] = self.rng.randint(-2, 2)
        return body, self.asked.pictures[index]

    async def answer(self) -> int:
        body, want = self._draw()
        reply = await self.http.post("/v1/images/generations", json=body)
        if self._refused(reply.status_code, reply.headers, reply.content):
            return 0
        data = reply.json()["data"]
        if len(data) != len(want):
            raise Wrong(f"{len(data)} pictures in place of {len(want)}")
        for index, each in enumerate(data):
            check(each["b64_json"], want[index], body)
        return len(want)

    async def stream(self) -> int:
        body, want = self._draw()
        body |= {"stream": True, "partial_images": self.rng.randint(0, 3)}
        async with self.http.stream("POST", "/v1/images/generations", json=body) as reply:
            content = await reply.aread()
        if self._refused(reply.status_code, reply.headers, content):
            return 0
        return self._events(content, want, body)

    async def cancels(self) -> int:
        body, _ = self._draw()
        post = asyncio.create_task(self.http.post("/v1/images/generations", json=body))
        await asyncio.wait([post], timeout=self.rng.expovariate(10))
        self.answers["came before it was cancelled" if post.done() else "cancelled"] += 1
        post.cancel()
        with suppress(asyncio.CancelledError, httpx.TransportError):
            await post
        return 0

    async def malformed(self) -> int:
        content, kind = rubbish(self.rng, dict(self._draw()[0]))
        try:
            reply = await self.http.post("/v1/images/generations", content=content, headers={"content-type": kind})
        except (httpx.ReadError, httpx.WriteError):
            if len(content) <= LARGE:
                raise
            self.answers["malformed, cut off"] += 1  # while it was still being sent
            return 0
        if not 400 <= reply.status_code < 500:
            raise Wrong(f"{reply.status_code} for {content[:200]!r} as {kind}")
        self._refused(reply.status_code, reply.headers, reply.content, malformed=True)
        return 0

    async def hangs_up(self) -> int:
        """In the middle of the body, while it waits, or in the middle of the answer."""
        body, _ = self._draw()
        body["stream"] = self.rng.random() < 0.5
        message = raw_request(self.port, body)
        if self.rng.random() < 0.3:
            message = message[: self.rng.randrange(1, len(message))]
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(message)
            await writer.drain()
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.readexactly(self.rng.randint(1, 5000)), self.rng.expovariate(5))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            if self.rng.random() < 0.5:
                writer.transport.abort()  # a reset, not an end
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        self.answers["hung up"] += 1
        return 0

    async def reads_slowly(self) -> int:
        """A stream of many events through a small window. The server may cut it off."""
        body, want = self._draw()
        body |= {"stream": True, "partial_images": 3}
        with socket.socket() as small:
            small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            small.setblocking(False)
            await asyncio.get_running_loop().sock_connect(small, ("127.0.0.1", self.port))
            reader, writer = await asyncio.open_connection(sock=small, limit=2048)
            found = b""
            try:
                writer.write(raw_request(self.port, body))
                await writer.drain()
                pause = self.rng.choice((0.0, 0.01, 0.1))
                async with asyncio.timeout(PATIENCE):
                    while part := await reader.read(512):
                        found += part
                        await asyncio.sleep(pause)
            except ConnectionError:
                self.answers["cut off"] += 1
                return 0
            finally:
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()
        head, _, rest = found.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        headers = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:])
        content = unchunked(rest) if "chunked" in headers.get("transfer-encoding", "") else rest
        return 0 if self._refused(status, headers, content) else self._events(content, want, body)

    # --- what comes back

    def _refused(self, status: int, headers: Mapping[str, str], content: bytes, *, malformed: bool = False) -> bool:
        """Whether it was refused, as a client may be. Raises ``Wrong`` for all else that is no answer."""
        self.answers[f"malformed, {status}" if malformed else str(status)] += 1
        self.was_refused = status == 429
        if status == 200:
            return False
        error = json.loads(content)["error"]
        if not {"message", "type", "param", "code"} <= error.keys() or not error["message"]:
            raise Wrong(f"an error without OpenAI's shape: {content[:300]!r}")
        if "Traceback" in error["message"] or "/site-packages/" in error["message"]:
            raise Wrong(f"an error that tells of the inside: {content[:300]!r}")
        if malformed:
            return True
        if status != 429 or not float(headers.get("retry-after", "0")) > 0:
            raise Wrong(f"{status} {dict(headers)} {content[:300]!r}")
        return True

    def _events(self, content: bytes, want: Pictures, body: Mapping[str, Any]) -> int:
        drawn: dict[int, str] = {}
        for event in content.decode().split("\n\n"):
            fields = dict(line.partition(": ")[::2] for line in event.splitlines())
            if fields.get("event") == "error":
                raise Wrong(f"an error event: {fields['data'][:300]}")
            if fields.get("event", "").endswith(".completed"):
                data = json.loads(fields["data"])
                drawn[data["image_index"]] = data["b64_json"]
        if sorted(drawn) != list(range(len(want))):
            raise Wrong(f"a stream that completed images {sorted(drawn)} of {len(want)}")
        for index, text in drawn.items():
            check(text, want[index], body)
        return len(want)


def check(text: str, want: Pictures, body: Mapping[str, Any]) -> None:
    """Raises ``Wrong`` where the picture is not the one that was drawn alone (``[H,W,C]``)."""
    from PIL import Image

    got = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    got = got.reshape(*got.shape[:2], -1)[..., : want.shape[-1]]
    if got.shape != want.shape:
        raise Wrong(f"a picture of {got.shape} in place of {want.shape}, of {body}")
    difference = int(np.abs(got.astype(np.int16) - want.astype(np.int16)).max())
    if difference > LEVELS:
        raise Wrong(f"a picture that differs by {difference} levels from the one alone, of {body}")


def raw_request(port: int, body: Mapping[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    return f"{head}connection: close\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content


def unchunked(content: bytes) -> bytes:
    found = b""
    while content:
        size, _, content = content.partition(b"\r\n")
        length = int(size, 16)
        found, content = found + content[:length], content[length + 2 :]
    return found


def rubbish(rng: random.Random, body: dict[str, Any]) -> tuple[bytes, str]:
    """A body that no server may accept, and what it is said to be."""
    text = json.dumps(body).encode()
    wrong: list[tuple[str, Any]] = [
        ("steps", "many"), ("steps", 0), ("steps", 10**12), ("n", -1), ("n", 10**9), ("n", 1.5), ("seed", -1),
        ("seed", 2**80), ("fraction", 2), ("guidance", -1), ("guidance", "1e400"), ("solver", "nonsense"),
        ("size", "1x1"), ("size", "x" * 5000), ("class_labels", [10**6]), ("class_labels", {"a": 1}),
        ("schedule", "large:0.5,nobody"), ("model", "../../etc/passwd"), ("response_format", "url"),
        ("output_format", "exe"), ("latency_budget_ms", -5), ("stream", "yes"), ("priority", 10**9),
        ("nobody_knows", 1), ("prompt", ["a"]),
    ]  # fmt: skip
    key, value = rng.choice(wrong)
    forms = [
        (json.dumps({**body, key: value}).encode(), "application/json"),
        (json.dumps({**body, key: value}).encode(), "application/json"),
        (text[: rng.randrange(len(text))], "application/json"),
        (rng.randbytes(rng.randrange(1, 4096)), "application/json"),
        (b"[" * rng.randrange(1, 100_000), "application/json"),
        (b'{"steps": NaN}', "application/json"),
        (b"[]", "application/json"),
        (b'{"prompt": "' + b"a" * (3 << 20) + b'"}', "application/json"),
        (text, "multipart/form-data; boundary=none"),
        (text, "image/png"),
    ]
    return rng.choice(forms)


if __name__ == "__main__":
    sys.exit(main())
