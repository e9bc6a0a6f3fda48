"""What an operator allows of requests, and how the server is reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tstitch_engines.checks import check_number, check_whole
from tstitch_engines.errors import BadInput
from tstitch_trt.serve.http.auth import Keys

__all__ = ["HttpLimits", "HttpSettings"]

_MOST_BYTES = 1 << 40
_MOST_SECONDS = 86_400.0


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """What one request may ask for; more is refused with a 4xx. Raises ``BadInput`` for a limit out of range.

    ``json_bytes``: of a JSON body without pictures. ``body_bytes``: of a body with pictures. ``bodies_bytes``: of all
    bodies that are read or decoded at once. ``body_seconds``: until a body has arrived. ``prompt``: characters, of the
    negative prompt too. ``images``: per request. ``picture_pixels``: of a picture or mask that is sent. ``pixels``:
    of one picture to draw. ``steps``: per image. ``guidance``: the largest scale. ``priority``: the highest one a
    client may ask for, and its negative the lowest. ``latency_budget_ms``: the longest budget.
    """

    json_bytes: int = 1 << 20
    body_bytes: int = 32 << 20
    bodies_bytes: int = 512 << 20
    body_seconds: float = 30.0
    prompt: int = 8_000
    images: int = 10
    picture_pixels: int = 16_000_000
    pixels: int = 4_194_304
    steps: int = 250
    guidance: float = 100.0
    priority: int = 10
    latency_budget_ms: float = 3_600_000.0

    def __post_init__(self) -> None:
        most = {
            "json_bytes": _MOST_BYTES, "body_bytes": _MOST_BYTES, "bodies_bytes": _MOST_BYTES, "prompt": 20_000,
            "images": 1_000, "picture_pixels": 50_000_000, "pixels": 1_000_000_000, "steps": 1_000_000,
        }  # fmt: skip
        for name, high in most.items():
            check_whole(getattr(self, name), name, 1, high)
        check_whole(self.priority, "priority", 0, 100)
        if self.bodies_bytes < self.body_bytes:
            raise BadInput(
                f"bodies_bytes {self.bodies_bytes:,} is less than body_bytes {self.body_bytes:,}, of one body",
                hint="give room for several bodies",
            )
        check_number(self.body_seconds, "body_seconds", 0.1, _MOST_SECONDS)
        check_number(self.guidance, "guidance", 1, 1e6)
        check_number(self.latency_budget_ms, "latency_budget_ms", 1, _MOST_SECONDS * 1000)


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """How the server is reached and what it allows.

    ``keys``: who may use it, ``None`` for everybody. ``timeout``: seconds from a request's arrival until it is
    cancelled, ``None`` for never. ``cors_origins``: pages of these origins may use it from a browser, ``("*",)`` for
    all. ``hosts``: the only values of the header Host that are served, without the port; empty for any. Without keys a
    server that listens on loopback only is to be given the names of loopback, because pages of other sites reach it
    under a name of their own (DNS rebinding). ``root_path``: the path under which a proxy serves it. ``open_paths``:
    served without a key.

    ``reload``: loads changed bundles and returns the names of those that were replaced, for ``POST /admin/reload``. It
    is called in a thread, once at a time; what it raises is reported as it reports the errors of requests.
    """

    limits: HttpLimits = field(default_factory=HttpLimits)
    keys: Keys | None = None
    timeout: float | None = 300.0
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    root_path: str = ""
    open_paths: tuple[str, ...] = ("/healthz", "/readyz", "/metrics", "/docs", "/openapi.json")
    reload: Callable[[], Sequence[str]] | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None:
            check_number(self.timeout, "timeout", 0.1, _MOST_SECONDS)
        root = self.root_path
        if root and (not root.startswith("/") or root.endswith("/")):
            raise BadInput(
                f"root_path is {root!r}; allowed is a path that begins with a slash and does not end with one",
                hint="e.g. --root-path /images",
            )
        for origin in self.cors_origins:
            scheme, found, rest = origin.partition("://")
            if origin != "*" and not (found and scheme in ("http", "https") and rest and "/" not in rest):
                raise BadInput(
                    f"origin {origin!r} is none; allowed is scheme://host[:port], or * for all",
                    hint="e.g. --cors-origin https://app.example.org",
                )
