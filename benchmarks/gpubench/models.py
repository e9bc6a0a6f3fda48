"""DiTs with random weights, made on the spot, and bundles of them. Importing this imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpubench.cases import GUIDANCE, GUIDED_CHANNELS, MODELS, DitCase
from gpubench.flops import CHANNELS, LABELS
from gpubench.record import Context
from gpubench.trajectories import TORCH_DTYPES, Pair
from tstitch_engines.bundle.manifest import Conditioning, Decoder, Defaults, Latent, Manifest, Member, NoiseScheduleSpec

__all__ = ["SETTINGS", "build_bundle", "plan_manifest", "random_dit", "random_pair"]

# `leading` are the timesteps of diffusers' DDIM, so that its own scheduler can be one of the contenders.
SETTINGS: dict[str, Any] = {
    "solver": "ddim",
    "spacing": "leading",
    "guidance": GUIDANCE,
    "guided_channels": GUIDED_CHANNELS,
}


def random_dit(model: str, pixels: int) -> Any:
    """The module in float32 on the CPU: the same weights every time.

    Matrices are drawn so that variance is kept through a layer, gates of the blocks so that a block changes its input
    by a tenth or so, and the output has about unit variance, as noise has. (The zeros of adaLN-Zero would turn every
    block into the identity, and any engine would pass.)
    """
    import torch

    from tstitch_export.families.dit.config import DiTConfig
    from tstitch_export.families.dit.model import DiT, sincos_position

    depth, width, heads, patch = MODELS[model]
    config = DiTConfig(
        depth=depth,
        width=width,
        heads=heads,
        patch=patch,
        size=pixels // 8,
        channels=CHANNELS,
        classes=LABELS - 1,
        learn_sigma=True,
    )
    with torch.device("meta"):  # no time spent on an initialisation that is replaced
        module = DiT(config)
    module = module.to_empty(device="cpu")
    module.pos_embed = sincos_position(width, config.grid)
    generator = torch.Generator().manual_seed(depth * width)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("embedding_table.weight"):
                scale = 0.5
            elif parameter.ndim == 1:
                scale = 0.02
            elif "adaLN_modulation" in name:
                scale = 0.1 / width**0.5
            else:
                scale = parameter[0].numel() ** -0.5
            parameter.normal_(0.0, scale, generator=generator)
    return module.eval().requires_grad_(False)


def random_pair(case: DitCase, precision: str, device: str) -> Pair:
    import torch

    dtype = getattr(torch, TORCH_DTYPES[precision])
    return Pair(
        models={
            name: random_dit(model, case.pixels).to(device=device, dtype=dtype)
            for name, model in (("small", case.small), ("large", case.large))
        },
        device=device,
        precision=precision,
        channels=CHANNELS,
        null=LABELS - 1,
        guidance=GUIDANCE,
        guided_channels=GUIDED_CHANNELS,
    )


def plan_manifest(case: DitCase) -> Manifest:
    """What a plan is made from, without exporting anything."""
    side = case.pixels // 8
    member = Member(
        family="dit",
        parametrisation="eps",
        precision="fp32",
        learned_variance=True,
        inputs=(),
        outputs=(),
        onnx=(),
        sources=(),
        check=None,
        config={},
    )
    return Manifest(
        schema=1,
        name=case.name,
        recipe="",
        versions={},
        latent=Latent(channels=CHANNELS, height=side, width=side),
        noise=NoiseScheduleSpec(kind="linear"),
        conditioning=Conditioning(classes=LABELS - 1, null=LABELS - 1),
        defaults=Defaults(),
        decoder=Decoder(kind="none"),
        members={"small": member, "large": member},
    )


def build_bundle(
    context: Context, case: DitCase, backend: str, options: dict[str, Any], *, largest: int | None = None
) -> Path:
    """A bundle of the pair for this case's batch alone (both halves), or for 2 to ``largest`` rows.

    Bundles are kept under ``scratch``.
    """
    from safetensors.torch import save_file

    from tstitch_engines.spec import Range
    from tstitch_export.build import build

    context.scratch.mkdir(parents=True, exist_ok=True)
    members, pair = {}, {"small": case.small, "large": case.large}
    for name, model in pair.items():
        depth, width, *_ = MODELS[model]
        members[name] = context.scratch / f"{depth}x{width}-{case.pixels}.safetensors"
        if not members[name].is_file():
            partial = members[name].with_suffix(".partial")
            save_file(random_dit(model, case.pixels).state_dict(), partial)
            partial.rename(members[name])
    side = case.pixels // 8
    recipe = context.scratch / f"{case.name}.toml"
    recipe.write_text(
        f'name = "{case.name}"\ndescription = "random weights"\n'
        f"[latent]\nchannels = {CHANNELS}\nheight = {side}\nwidth = {side}\n"
        '[noise]\nkind = "linear"\n'
        f"[conditioning]\nclasses = {LABELS - 1}\nnull = {LABELS - 1}\n"
        f'[defaults]\nsteps = {case.steps}\n[decoder]\nkind = "none"\n'
        + "".join(f'[members.{name}]\nfamily = "dit"\nparametrisation = "eps"\n' for name in pair)
    )
    rows = 2 * case.batch
    tag = "".join(f"-{key}-{value}" for key, value in options.items()) + (f"-to-{largest}" if largest else "")
    output = context.scratch / f"{case.name}-{backend}{tag}.bundle"
    build(
        recipe,
        members=members,
        output=output,
        backend=backend,
        precision=case.precision,  # type: ignore[arg-type]
        profile=Range(rows, rows, rows) if largest is None else Range(2, largest, largest),
        device=context.device,
        options={**options, **{f"{name}.num_heads": MODELS[model][2] for name, model in pair.items()}},
    )
    return output
