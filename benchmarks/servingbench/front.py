"""The front that all contenders stand behind: LitServe over HTTP, with one worker that owns the engines.

    python -m servingbench.front '{"contender": "single", "bundle": "fashion.bundle", ...}' PORT

``POST /predict`` takes an ``Ask`` as JSON and answers with the pictures and the worker's counters so far. Annotations
are evaluated here: LitServe reads those of ``decode_request``.
"""

import base64
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import litserve
import msgspec
import numpy as np
from numpy.typing import NDArray

import tstitch_trt
from servingbench.asks import Ask, Kind
from servingbench.figures import Counters
from tstitch_engines.errors import BadInput, Busy
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.observer import Observer, TickInfo

__all__ = ["CONTENDERS", "Setup", "front_api"]

Pictures = NDArray[np.uint8]


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """How a contender is set up. ``most``: requests of one batch of LitServe's, for which it waits ``wait`` seconds."""

    contender: str
    bundle: str
    device: str = "cpu"
    threads: int = 1
    most: int = 8
    wait: float = 0.005


class Front(litserve.LitAPI):  # type: ignore[misc]
    """What all have in common: the form of requests and answers."""

    def __init__(self, setup: Setup, **settings: Any) -> None:
        super().__init__(**settings)
        self.options = setup
        self.counters = Counters()

    def load(self) -> tstitch_trt.Runtime:
        on_cpu = self.options.device == "cpu"
        return tstitch_trt.load(
            self.options.bundle,
            device=self.options.device,
            threads=self.options.threads if on_cpu else None,
            verify="size",
        )

    def count(self, calls: int, lanes: int) -> None:
        before = self.counters
        self.counters = msgspec.structs.replace(before, calls=before.calls + calls, lanes=before.lanes + lanes)

    def decode_request(self, request: dict[str, Any]) -> Ask:
        return msgspec.convert(request, Ask)

    def encode_response(self, output: Pictures) -> dict[str, Any]:
        return self.answer(output)

    def answer(self, pictures: Pictures) -> dict[str, Any]:
        return {
            "shape": pictures.shape,
            "pixels": base64.b64encode(pictures.tobytes()).decode(),
            "counters": msgspec.to_builtins(self.counters),
        }


class Single(Front):
    """One request at a time: ``Runtime.sample`` behind LitServe's queue."""

    def setup(self, device: str) -> None:
        self.runtime = self.load()

    def predict(self, ask: Ask) -> Pictures:
        pictures, steps = sample(self.runtime, ask.kind, ask.labels, ask.seeds)
        self.count(steps, steps * ask.kind.images)
        return pictures


class Batched(Front):
    """Whole requests in batches that LitServe gathers. Those with equal plans share one call of ``Runtime.sample``."""

    def setup(self, device: str) -> None:
        self.runtime = self.load()

    def predict(self, batch: Sequence[Ask]) -> list[Pictures]:
        groups: dict[Kind, list[int]] = {}
        for index, ask in enumerate(batch):
            groups.setdefault(ask.kind.plan, []).append(index)
        found: dict[int, Pictures] = {}
        for kind, indices in groups.items():
            asks = [batch[i] for i in indices]
            labels = [label for ask in asks for label in ask.labels]
            pictures, steps = sample(self.runtime, kind, labels, [seed for ask in asks for seed in ask.seeds])
            chunks = len(self.runtime.splitting.chunks(len(labels), guided=kind.guidance != 1))
            self.count(steps * chunks, steps * len(labels))
            ends = np.cumsum([ask.kind.images for ask in asks])
            found |= zip(indices, np.split(pictures, ends[:-1]), strict=True)
        return [found[index] for index in range(len(batch))]


def sample(
    runtime: tstitch_trt.Runtime, kind: Kind, labels: Sequence[int], seeds: Sequence[int]
) -> tuple[Pictures, int]:
    """The pictures and how many steps they took."""
    result = runtime.sample(labels=list(labels), seeds=list(seeds), **kind.keywords())
    assert result.images is not None, "the bundle has a decoder"
    return result.images, len(result.plan.schedule.names)


class Diffusers(Front):
    """One request at a time: diffusers' scheduler around the same members as PyTorch modules."""

    def setup(self, device: str) -> None:
        import torch
        from gpubench.diffusers_trajectory import DiffusersTrajectory, diffusers_schedulers
        from gpubench.trajectories import Pair

        from tstitch_engines.bundle.bundle import open_bundle
        from tstitch_trt.plan.plan import Plan, make_plan
        from tstitch_trt.reference.torch_module import torch_module
        from tstitch_trt.request.init_image import noise_of

        torch.set_num_threads(self.options.threads)
        bundle = open_bundle(self.options.bundle)
        manifest = bundle.manifest
        if manifest.decoder.kind != "pixel":
            raise BadInput(
                f"the bundle's decoder is {manifest.decoder.kind!r}; the diffusers loop makes pictures of pixels only",
                hint="leave diffusers out of --contenders",
            )
        models = {
            name: torch_module(name, member, [bundle.path(part) for part in member.onnx]).requires_grad_(False)
            for name, member in manifest.members.items()
        }
        plans: dict[Kind, tuple[Plan, DiffusersTrajectory]] = {}

        def trajectory(kind: Kind) -> tuple[Plan, DiffusersTrajectory]:
            """Its scheduler is kept: a server makes it once."""
            if kind not in plans:
                settings = kind.keywords()
                plan = make_plan(manifest, **settings)
                pair = Pair(
                    models=models,
                    device=self.options.device,
                    precision="fp32",
                    channels=manifest.latent.channels,
                    null=manifest.conditioning.null,
                    guidance=kind.guidance,
                    guided_channels=manifest.latent.channels,
                )
                schedulers = diffusers_schedulers(manifest, solver=kind.solver, spacing=settings["spacing"])
                plans[kind] = plan, DiffusersTrajectory(pair, schedulers)
            return plans[kind]

        def draw(ask: Ask) -> tuple[Pictures, int]:
            plan, walked = trajectory(ask.kind.plan)
            height, width = ask.kind.size or (manifest.latent.height, manifest.latent.width)
            walked.prepare(noise_of(ask.seeds, (manifest.latent.channels, height, width)), list(ask.labels))
            latents = walked.walk(plan)
            pixels = ((latents / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy(), len(plan.schedule.names)

        self.draw = draw

    def predict(self, ask: Ask) -> Pictures:
        pictures, steps = self.draw(ask)
        self.count(steps, steps * ask.kind.images)
        return pictures


class Counting(Observer):
    """Adds up the ticks of an engine. ``large``: its last member."""

    def __init__(self, large: str) -> None:
        self.large = large
        self.found = Counters()

    def ticked(self, tick: TickInfo) -> None:
        before, large = self.found, tick.member == self.large
        self.found = Counters(
            calls=before.calls + 1,
            lanes=before.lanes + tick.lanes,
            overhead=before.overhead + tick.overhead,
            large_calls=before.large_calls + large,
            large_seconds=before.large_seconds + large * tick.seconds,
        )


class Ours(Front):
    """``tstitch_trt.serve.Engine``: LitServe hands every request on at once, and the engine batches steps.

    ``told``: whether the engine is told the limit of each request, which it may then refuse.
    """

    def __init__(self, setup: Setup, *, told: bool) -> None:
        super().__init__(setup, enable_async=True)
        self.told = told

    def setup(self, device: str) -> None:
        runtime = self.load()
        self.observer = Counting(runtime.members[-1])
        self.engine = Engine(runtime, observer=self.observer)
        self.engine.warm_up()

    async def decode_request(self, request: dict[str, Any]) -> Ask:  # type: ignore[override]
        return msgspec.convert(request, Ask)

    async def predict(self, ask: Ask) -> Pictures:
        budget = 1e3 * ask.limit if self.told and ask.limit is not None else None
        settings = {**ask.kind.keywords(), "labels": list(ask.labels), "seeds": list(ask.seeds)}
        try:
            result = await self.engine.submit(latency_budget_ms=budget, **settings)
        except Busy as error:
            from fastapi import HTTPException

            raise HTTPException(429, error.message) from None
        assert result.images is not None, "the bundle has a decoder"
        return result.images

    async def encode_response(self, output: Pictures) -> dict[str, Any]:  # type: ignore[override]
        self.counters = self.observer.found
        return self.answer(output)


CONTENDERS: Final = {
    "single": "Runtime.sample behind a queue, one request at a time",
    "litserve": "whole requests batched by LitServe; those with equal plans in one call of Runtime.sample",
    "diffusers": "diffusers' scheduler around the same members in PyTorch, one request at a time",
    "engine": "tstitch_trt.serve.Engine: steps batched",
    "engine+limit": "the same, told the latency limit of each request",
}


def front_api(setup: Setup) -> Front:
    if setup.contender.startswith("engine"):
        return Ours(setup, told=setup.contender.endswith("+limit"))
    if setup.contender == "litserve":
        return Batched(setup, max_batch_size=setup.most, batch_timeout=setup.wait)
    return {"single": Single, "diffusers": Diffusers}[setup.contender](setup)


def end_with(parent: int) -> None:
    """Ends this process and its workers, which are a group, once the benchmark is gone, however it ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    setup = msgspec.json.decode(sys.argv[1], type=Setup)
    server = litserve.LitServer(front_api(setup), accelerator="cpu", devices=1, timeout=False, disable_openapi_url=True)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[2]),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )


if __name__ == "__main__":
    main()
