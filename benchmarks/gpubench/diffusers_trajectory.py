"""T-Stitch as a user of diffusers writes it by hand: its scheduler around the same modules, another one late on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gpubench.trajectories import Pair
from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadInput, Unavailable, unknown_name
from tstitch_trt.plan.plan import Plan

__all__ = ["SOLVERS", "DiffusersTrajectory", "diffusers_schedulers"]

# Our solver -> the class of diffusers and what makes it that solver, with the whole range of its estimates kept.
SOLVERS: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}
_BETAS: Final = {"linear": "linear", "scaled-linear": "scaled_linear", "squared-cosine": "squaredcos_cap_v2"}
_PREDICTIONS: Final = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def diffusers_schedulers(manifest: Manifest, *, solver: str, spacing: str) -> dict[str, Any]:
    """Member -> its scheduler: one for all that predict the same.

    Raises ``Unavailable`` without diffusers, and ``BadInput`` for members that predict different things and a solver
    with a memory, which diffusers keeps in the scheduler.
    """
    try:
        import diffusers
    except ImportError as error:
        raise Unavailable(f"diffusers is not installed ({error})", hint='pip install "tstitch-trt[export]"') from None
    if solver not in SOLVERS:
        raise unknown_name("solver of the diffusers loop", solver, SOLVERS)
    kinds = {name: member.parametrisation for name, member in manifest.members.items()}
    for name, kind in kinds.items():
        if kind not in _PREDICTIONS:
            raise BadInput(
                f"the member {name!r} predicts {kind}, which the diffusers loop does not know; "
                f"allowed: {', '.join(_PREDICTIONS)}",
                hint="leave diffusers out of --contenders",
            )
    if solver != "ddim" and len(set(kinds.values())) > 1:
        raise BadInput(
            f"the members predict {' and '.join(sorted(set(kinds.values())))}, and diffusers' {SOLVERS[solver][0]} "
            "keeps what it remembers to itself: a second one would start with nothing; allowed is one and the same",
            hint="use --solver ddim, or leave diffusers out of --contenders",
        )
    name, settings = SOLVERS[solver]
    made = {
        kind: getattr(diffusers, name)(
            num_train_timesteps=manifest.noise.steps,
            beta_start=manifest.noise.beta_start,
            beta_end=manifest.noise.beta_end,
            beta_schedule=_BETAS[manifest.noise.kind],
            prediction_type=_PREDICTIONS[kind],
            timestep_spacing=spacing,
            **settings,
        )
        for kind in set(kinds.values())
    }
    return {member: made[kind] for member, kind in kinds.items()}


class DiffusersTrajectory:
    """The loop of diffusers' pipelines, the denoiser chosen by the step; the modules run eagerly."""

    def __init__(self, pair: Pair, schedulers: Mapping[str, Any]) -> None:
        import torch

        self._torch = torch
        self._pair = pair
        self._schedulers = schedulers

    def prepare(self, noise: NDArray[np.float32], labels: list[int]) -> None:
        """Puts what a request brings onto the device; not timed."""
        self._noise = self._torch.from_numpy(noise).to(self._pair.device)
        self._classes = self._pair.classes(labels)

    def walk(self, plan: Plan) -> Any:
        """The final latents on the device, of the plan's members at its steps; all else is diffusers' own."""
        torch, pair = self._torch, self._pair
        names = plan.schedule.names
        for scheduler in {id(each): each for each in self._schedulers.values()}.values():
            scheduler.set_timesteps(len(names), device=pair.device)
        first = self._schedulers[names[0]]
        with torch.inference_mode():
            x = self._noise * first.init_noise_sigma
            for name, t in zip(names, first.timesteps, strict=True):
                scheduler = self._schedulers[name]
                sample = torch.cat([x, x]) if pair.guided else x
                sample = scheduler.scale_model_input(sample, t).to(pair.dtype)
                timestep = t.float().expand(sample.shape[0])
                output = pair.output_of(pair.models[name], sample, timestep, self._classes)
                x = scheduler.step(output, t, x).prev_sample
            return x
