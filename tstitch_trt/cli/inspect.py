"""``tstitch-trt inspect``: what a bundle holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tstitch_trt.cli._command import tstitch_command

if TYPE_CHECKING:
    from tstitch_engines.backends.tensorrt import PlanHeader
    from tstitch_engines.bundle.bundle import Bundle
    from tstitch_engines.bundle.manifest import EngineRecord, Manifest, Member, Network

__all__ = ["command"]

EXAMPLES = """
tstitch-trt inspect fashion.bundle
tstitch-trt inspect fashion.bundle --json
"""


@tstitch_command("inspect", EXAMPLES)
def command(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE holds. Every file's size and sha256 are checked first."""
    from tstitch_engines.bundle.bundle import open_bundle
    from tstitch_trt.cli._text import print_json

    opened = open_bundle(bundle)
    if as_json:
        print_json(_document(opened))
    else:
        _print(opened)


def _document(bundle: Bundle) -> dict[str, Any]:
    """The manifest, for every engine the digest of its identity, and what the header of a TensorRT-RTX plan says."""
    import msgspec

    from tstitch_engines.bundle.identity import digest
    from tstitch_trt.runtime.memory import planned_memory

    document: dict[str, Any] = msgspec.to_builtins(bundle.manifest)
    described = {**document["members"], **document["parts"]}
    for name, network in bundle.manifest.networks().items():
        for engine, record in zip(described[name]["engines"], network.engines, strict=True):
            engine["digest"] = digest(record.identity)
            engine["graphs"] = _graphs(record)
            if (plan := _plan(bundle, record)) is not None:
                engine["plan"] = {"version": plan.version, "gpus": plan.gpus()}
    files = bundle.manifest.components()
    return {
        "path": str(bundle.root),
        "bytes": sum(part.bytes for part in files),
        "files": len(files),
        "memory": planned_memory(bundle.manifest),
        **document,
    }


def _print(bundle: Bundle) -> None:
    from tstitch_trt.cli._text import print_table, size
    from tstitch_trt.runtime.memory import planned_memory

    manifest = bundle.manifest
    latent, noise, conditioning, defaults = manifest.latent, manifest.noise, manifest.conditioning, manifest.defaults
    files = manifest.components()
    click.echo(f"{bundle.root}: {manifest.name} (recipe {manifest.recipe}, schema {manifest.schema})")
    for word, text in (
        ("latent", f"{latent.channels} x {latent.height} x {latent.width}, decoder {manifest.decoder.kind}"),
        ("noise", f"{noise.kind}, {noise.steps} steps, beta {noise.beta_start:g} to {noise.beta_end:g}"),
        ("sizes", _sizes(manifest)),
        ("asked for", _conditioning(manifest)),
        ("names", ", ".join(conditioning.names)),
        (
            "defaults",
            f"{defaults.solver}{_options(defaults.solver_options)}, {defaults.steps} steps, "
            f"spacing {defaults.spacing}, guidance {defaults.guidance:g}, schedule {defaults.schedule}",
        ),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
        ("quality", "network and reference statistics" if manifest.quality else "none"),
        *(("note", note) for note in manifest.notes),
        ("files", f"{len(files)}, {size(sum(part.bytes for part in files))}, all verified"),
    ):
        if text:
            click.echo(f"  {word:<10} {text}")
    for backend, parts in planned_memory(manifest).items():
        planned = ", ".join(f"{what} {size(nbytes)}" for what, nbytes in parts.items())
        click.echo(f"  {'memory':<10} {planned} with {backend}; bench adds the activations")
    for name, network in manifest.networks().items():
        click.echo()
        _print_network(bundle, name, network)
    click.echo()
    print_table(("file", "size", "sha256"), [(part.path, size(part.bytes), part.sha256) for part in files])


def _sizes(manifest: Manifest) -> str:
    """The pictures that can be asked for, of the engines that the default backend has."""
    from tstitch_trt.runtime.memory import planned_limits

    found = [limits.sizes() for limits in planned_limits(manifest).values()]
    return next(iter(found), "")


def _conditioning(manifest: Manifest) -> str:
    conditioning = manifest.conditioning
    if conditioning.kind == "class":
        null = "none" if conditioning.null is None else str(conditioning.null)
        return f"{conditioning.classes} classes, null class {null}"
    encoders = [name for name in manifest.parts if name.startswith("text_encoder")]
    text = f"prompts, read by {', '.join(encoders)}" if encoders else "prompt_embeds (there is no text encoder)"
    more = {"vae_encoder": "pictures to start from", "controlnet": "control pictures"}
    return ", ".join([text, *(word for part, word in more.items() if part in manifest.parts)])


def _conventions(member: Member) -> list[tuple[str, str]]:
    """What a member has of its own, or takes beside sample and time."""
    said: list[tuple[str, str]] = []
    if (text := member.text) is not None:
        words = [f"{text.width} wide" + (f" from {', '.join(text.hidden)}" if text.hidden else "")]
        words += [f"pooled {text.pooled_width}"] if text.pooled_width else []
        words += [f"time_ids of {text.time_ids}"] if text.time_ids != "none" else []
        words += ["zeros where no negative prompt is given"] if text.zero_null else []
        said.append(("text", ", ".join(words)))
    own = [f"latent {member.latent_ratio:g} times the bundle's"] if member.latent_ratio != 1 else []
    if (noise := member.noise) is not None:
        own.append(f"noise {noise.kind}, {noise.steps} steps, beta {noise.beta_start:g} to {noise.beta_end:g}")
    own += [f"guidance scale as an input, {member.guidance_embedding} wide"] if member.guidance_embedding else []
    own += ["takes a ControlNet's residuals"] if member.controlled else []
    own += ["takes mask and masked picture"] if member.inpaints else []
    return [*said, *([("its own", "; ".join(own))] if own else [])]


def _options(options: Mapping[str, object]) -> str:
    return f" ({', '.join(f'{name}={value}' for name, value in options.items())})" if options else ""


def _plan(bundle: Bundle, record: EngineRecord) -> PlanHeader | None:
    from tstitch_engines.backends.tensorrt import read_plan_header

    return read_plan_header(bundle.path(record.files[0])) if record.identity.backend == "tensorrt-rtx" else None


def _graphs(record: EngineRecord) -> str:
    """The graph mode it runs in unless another is asked for, and why."""
    from tstitch_engines.backends import for_gpu

    if not for_gpu(record.identity.backend, record.identity.arch):
        return "off (the CPU has no graphs)"
    if record.identity.options.get("weight-streaming"):
        return "off (it streams weights, which allocates while it runs)"
    return "step (recorded when first run; bench says what could not be)"


def _print_network(bundle: Bundle, name: str, member: Network) -> None:
    """A member or a part."""
    from tstitch_engines.bundle.identity import digest
    from tstitch_engines.bundle.manifest import Member
    from tstitch_trt.cli._text import size

    denoiser = member if isinstance(member, Member) else None
    if denoiser is None:
        click.echo(f"part {name}: {member.family}, {member.precision}")
    else:
        variance = ", learned variance" if denoiser.learned_variance else ""
        click.echo(f"member {name}: {member.family}, predicts {denoiser.parametrisation}{variance}, {member.precision}")
    if member.config:
        click.echo(f"  {'config':<10} {', '.join(f'{key} {value}' for key, value in member.config.items())}")
    for word, text in () if denoiser is None else _conventions(denoiser):
        click.echo(f"  {word:<10} {text}")
    for word, specs in (("inputs", member.inputs), ("outputs", member.outputs)):
        click.echo(f"  {word:<10} {'; '.join(map(str, specs))}")
    for source in member.sources:
        click.echo(f"  {'source':<10} {source.name} ({size(source.bytes)}, sha256 {source.sha256})")
    if denoiser is not None and (made := denoiser.quantisation) is not None:
        worst = max(made.loss, key=lambda level: level.rel_l2)
        click.echo(
            f"  {'quantised':<10} from {made.source_precision}: {len(made.layers)} layers in {member.precision} "
            f"({made.method} of {made.rows} inputs at timesteps {made.timesteps[0]:g} to {made.timesteps[1]:g}), the "
            f"others in {made.high_precision}; relative L2 of its output at most {worst.rel_l2:.1e} (timesteps "
            f"{worst.timesteps[0]:g} to {worst.timesteps[1]:g}), of final latents {max(made.latents):.1e}"
        )
    if member.check is not None:
        batches = ", ".join(map(str, member.check.batches))
        click.echo(
            f"  {'checked':<10} against {member.check.against} at batch {batches}: max abs {member.check.max_abs:.1e}, "
            f"relative L2 {member.check.rel_l2:.1e}"
        )
    for record in member.engines:
        identity = record.identity
        profile = ", ".join(f"{dim} {sizes}" for dim, sizes in identity.profile.dims.items())
        options = ", ".join(f"{key}={value}" for key, value in identity.options.items())
        click.echo(
            f"  {'engine':<10} {identity.backend} {identity.backend_version} for {identity.arch}, "
            f"{identity.precision}, profile {profile}{', ' + options if options else ''}, "
            f"identity {digest(record.identity)[:16]}"
        )
        click.echo(f"  {'graphs':<10} {_graphs(record)}")
        if (plan := _plan(bundle, record)) is not None:
            click.echo(f"  {'plan':<10} TensorRT-RTX {plan.version}, compute capability {plan.gpus()}")
