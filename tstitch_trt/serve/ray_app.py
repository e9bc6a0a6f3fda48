"""The server on Ray Serve: fronts that speak HTTP, and engines, one a GPU.

A front parses, guards and limits as the server of one machine does, and fixes the seed. It gives a request to one of
the engines, and to another one where that is lost before it has answered.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, cast

import msgspec

from tstitch_engines.bundle.decode import DecodeError, convert
from tstitch_engines.errors import BadInput, FailedWork
from tstitch_engines.needs import require
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.http.app import create_app
from tstitch_trt.serve.http.auth import Keys
from tstitch_trt.serve.http.limits import HttpLimits, HttpSettings
from tstitch_trt.serve.ray_scaling import WaitingLanes
from tstitch_trt.serve.remote import Asked, Facts, Message, RemoteEngine, answer, facts_of

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["EngineReplica", "Front", "RayOptions", "build"]

_ONGOING: Final = 10_000  # requests of a replica: the engine's queue is what refuses more

_Count = Annotated[int, msgspec.Meta(ge=1)]


class RayOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``args`` of the application.

    ``bundles``: paths by the name of the model, the first is default; every machine has them. ``device``: ``cuda``
    gives each engine a GPU. ``cpus``: of each engine, and its threads where it runs on the CPU. ``api_key_file``: who
    may use it, read where the application is built; without one ``insecure`` must say that everybody may. ``target``:
    the share of its lanes that an engine is to have at work. The others are those of ``tstitch-trt serve``.
    """

    bundles: Annotated[dict[str, str], msgspec.Meta(min_length=1)]
    device: Literal["cpu", "cuda"] = "cpu"
    cpus: _Count = 1
    backend: str | None = None
    trust: bool = False
    require_signature: str | None = None
    max_lanes: _Count | None = None
    max_queue: _Count = 256
    max_queue_memory: str = "2GiB"
    engines: _Count = 1
    most_engines: _Count | None = None
    fronts: _Count = 1
    target: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8
    timeout: float = 300.0
    api_key_file: str | None = None
    insecure: bool = False
    cors_origins: tuple[str, ...] = ()
    max_images: int = 10
    max_steps: int = 250

    def settings(self) -> HttpSettings:
        """Raises ``BadInput`` where nobody would need a key and that was not said."""
        if (self.api_key_file is None) != self.insecure:
            problem = "insecure and api_key_file are both said" if self.insecure else "nobody would need a key"
            raise BadInput(problem, hint="args: api_key_file: FILE, or insecure: true to serve all who reach it")
        keys = None if self.api_key_file is None else Keys.read(self.api_key_file)
        limits = HttpLimits(images=self.max_images, steps=self.max_steps)
        return HttpSettings(limits=limits, keys=keys, timeout=self.timeout or None, cors_origins=self.cors_origins)

    def load(self) -> dict[str, Any]:
        """The keywords of ``tstitch_trt.load``."""
        return {
            "device": self.device, "backend": self.backend, "trust": self.trust,
            "require_signature": self.require_signature, "threads": self.cpus if self.device == "cpu" else None,
        }  # fmt: skip


class EngineReplica:
    """A deployment of Ray Serve: one batching engine."""

    def __init__(self, options: RayOptions) -> None:
        self._engine = Engine(
            {name: Path(path) for name, path in options.bundles.items()}, load=options.load(),
            max_lanes=options.max_lanes, max_queue=options.max_queue, max_queue_bytes=options.max_queue_memory,
        )  # fmt: skip
        self._engine.warm_up()

    async def facts(self) -> dict[str, Facts]:
        return facts_of(self._engine)

    async def draw(self, asked: Asked) -> AsyncIterator[Message]:
        async for message in answer(self._engine, asked):
            yield message

    async def check_health(self) -> None:
        """Ray ends a replica for which this raises, and starts another."""
        failed = self._engine.state().failed
        if failed is not None:
            raise FailedWork(failed, hint="Ray starts another replica")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For ``WaitingLanes``. The waiting of one bundle is not helped by free lanes of another."""
        models = self._engine.state().models.values()
        return {"busy": max((model.lanes + model.waiting_images) / model.max_lanes for model in models)}

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close(cancel=True)


@dataclass(frozen=True)
class _Engines:
    """``RemoteEngine.ask`` by a handle of Ray Serve."""

    handle: Any

    async def __call__(self, asked: Asked) -> AsyncGenerator[Message, None]:
        replies = self.handle.draw.remote(asked)
        try:
            async for message in replies:
                yield message
        finally:
            replies.cancel()


class Front:
    """The deployment that has the clients: an ASGI application for ``serve.ingress``."""

    async def __init__(self, engines: Any, settings: HttpSettings) -> None:  # type: ignore[misc]  # Ray awaits it
        facts = await engines.facts.remote()
        self._engine = RemoteEngine(_Engines(engines.options(stream=True)), facts, lost=_is_lost)
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(cast("Engine", self._engine), self._settings)

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


def _is_lost(error: Exception) -> bool:
    """Whether the replica, its machine, or the way to it is lost; not what its code raised."""
    from ray import exceptions
    from ray.serve.exceptions import RayServeException

    raised = (exceptions.RayTaskError, exceptions.TaskCancelledError)
    return isinstance(error, exceptions.RayError | RayServeException) and not isinstance(error, raised)


def build(args: Mapping[str, object]) -> Any:
    """The application of Ray Serve (``import_path: tstitch_trt.serve.ray_app:build``). ``args``: of ``RayOptions``."""
    serve = require("ray.serve", "the server on Ray", extra="ray")
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    try:
        options = convert(dict(args), RayOptions, word="argument")
    except DecodeError as error:
        raise BadInput(f"args: {error.message}", hint=error.fix or "see docs/how-to/ray.md") from None
    settings, most = options.settings(), options.most_engines or options.engines
    if most < options.engines:
        raise BadInput(
            f"args: most_engines is {most}, and engines, the fewest, {options.engines}",
            hint="raise most_engines, or leave it out for a fixed number",
        )
    engines = serve.deployment(
        EngineReplica,
        name="Engine",
        max_ongoing_requests=_ONGOING,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": int(options.device != "cpu")},
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.engines,
            max_replicas=most,
            policy=AutoscalingPolicy(policy_function=WaitingLanes, policy_kwargs={"target": options.target}),
        ),
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=120.0,
    )
    front = serve.deployment(
        serve.ingress()(Front), name="Front", num_replicas=options.fronts, max_ongoing_requests=_ONGOING,
        ray_actor_options={"num_cpus": 0.5}, graceful_shutdown_timeout_s=120.0,
    )  # fmt: skip
    return front.bind(engines.bind(options), settings)
