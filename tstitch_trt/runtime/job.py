"""One request as it is to be run: its keywords, checked as far as that needs no engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadInput
from tstitch_trt.plan.guidance import check_guidance_options
from tstitch_trt.plan.plan import Plan, make_plan
from tstitch_trt.request.limits import Limits
from tstitch_trt.request.options import SampleOptions
from tstitch_trt.request.parse import ParsedRequest, parse_request
from tstitch_trt.runtime.chooser import ChosenSchedule, ScheduleChooser, choose, chosen_options
from tstitch_trt.runtime.vae import Tile, Vae

__all__ = ["OUTPUTS", "Job", "Output"]

Output = Literal["host", "device"]
OUTPUTS: Final = ("host", "device")


@dataclass(frozen=True)
class Job:
    """``decode``: pictures are made. ``events``: what each step estimates is kept for previews. ``budget``: how the
    schedule was chosen, where a latency budget was given. ``partial``: an image that fails does not end the others."""

    parsed: ParsedRequest
    plan: Plan
    tile: Tile
    decode: bool
    output: Output
    events: bool
    budget: ChosenSchedule | None
    partial: bool

    @staticmethod
    def make(
        manifest: Manifest,
        limits: Limits,
        vae: Vae,
        chooser: ScheduleChooser | None,
        options: SampleOptions,
        *,
        decode: bool | None = None,
        output: Output = "host",
        tile: Tile = "auto",
        events: bool = False,
        within: float | None = None,
        partial: bool = False,
    ) -> Job:
        """``within``: a latency budget in milliseconds. Raises ``BadInput`` and its kinds."""
        if decode and output == "device":
            raise BadInput(
                "decode=True with output='device': pictures are made on the host",
                hint="leave out one of the two; runtime.decode(latents) makes pictures of host latents",
            )
        parsed = parse_request(manifest, limits, options)
        wanted, budget = options.plan, None
        if within is not None:
            budget = choose(chooser, manifest, within, wanted, parsed)
            wanted = chosen_options(wanted, budget)
        if start := parsed.first_step(wanted.asked_steps(manifest)):
            wanted = replace(wanted, start=start)
        plan = make_plan(manifest, wanted)
        if budget is None or not plan.embedded:
            check_guidance_options(wanted, plan.guided)
        parsed.check(manifest, plan, chosen=budget is not None)
        if decode is None:
            decode = manifest.decoder.kind != "none" and output == "host"
        vae.check(tile, parsed.size if decode else None)
        return Job(parsed, plan, tile, decode, output, events, budget, partial)
