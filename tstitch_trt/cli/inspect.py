"""``tstitch-trt inspect``: what a bundle holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tstitch_engines.errors import BadInput
from tstitch_trt.cli._command import option, tstitch_command
from tstitch_trt.cli._options import signature_option
from tstitch_trt.cli._text import print_entries

if TYPE_CHECKING:
    from tstitch_engines.backends.tensorrt import PlanHeader
    from tstitch_engines.bundle.bundle import Bundle
    from tstitch_engines.bundle.manifest import EngineRecord, Manifest, Member, Network, Source
    from tstitch_trt.cli._documents import InspectOutput
    from tstitch_trt.verify.plan_layers import LayerList

__all__ = ["command"]

EXAMPLES = """
tstitch-trt inspect fashion.bundle
tstitch-trt inspect fashion.bundle --json
tstitch-trt inspect fashion.bundle --layers
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    layers: bool = option(
        "Show the compiled layers of TensorRT engines that were built with --profiling-verbosity detailed."
    )
    require_signature: Path | None = signature_option()


@tstitch_command("inspect", EXAMPLES, wanted=Options)
def command(bundle: Path, wanted: Options, as_json: bool) -> None:
    """Show what BUNDLE holds. Every file's size and sha256 are checked first."""
    from tstitch_engines.bundle.bundle import open_bundle
    from tstitch_trt.cli._text import print_json

    opened = open_bundle(bundle, require_signature=wanted.require_signature)
    layers = _layers(opened) if wanted.layers else {}
    if as_json:
        print_json(_document(opened, layers))
    elif wanted.layers:
        _print_layers(opened, layers)
    else:
        _print(opened)


def _layers(bundle: Bundle) -> dict[str, LayerList | str]:
    """Of each engine that has layers, by its file, the list, or why there is none. Raises ``BadInput`` without any."""
    from tstitch_trt.verify.plan_layers import detailed_command, has_layers, list_layers

    records = [one for network in bundle.manifest.networks().values() for one in network.engines if has_layers(one)]
    if not records:
        raise BadInput(
            f"{bundle.root} has no engine of tensorrt or tensorrt-rtx, and only those have a list of layers",
            hint=f"build one: tstitch-trt build {bundle.root} --backend tensorrt-rtx --profiling-verbosity detailed",
        )
    found = {record.files[0].path: list_layers(bundle, record) for record in records}
    reasons = [text for text in found.values() if isinstance(text, str)]
    if len(reasons) == len(found):
        again = detailed_command(bundle, records[0])
        raise BadInput(
            f"no engine of {bundle.root} has a list of its layers: {reasons[0]}",
            hint=f"{again}; or on a GPU: tstitch-trt verify {bundle.root} --layers",
        )
    return found


def _print_layers(bundle: Bundle, layers: Mapping[str, LayerList | str]) -> None:
    from tstitch_trt.cli._layers import print_layers

    every = [(name, one) for name, network in bundle.manifest.networks().items() for one in network.engines]
    shown = [(name, one, layers[file]) for name, one in every if (file := one.files[0].path) in layers]
    for index, (name, record, found) in enumerate(shown):
        if index:
            click.echo()
        identity = record.identity
        built = f"{identity.backend} {identity.backend_version} for {identity.target}, {identity.precision}"
        print_layers(f"{bundle.manifest.word(name)} {name}: {built}", found)


def _document(bundle: Bundle, layers: Mapping[str, LayerList | str]) -> InspectOutput:
    """The manifest, for every engine the digest of its identity, and what the header of a TensorRT-RTX plan says.

    ``layers``: by file of an engine; a text says why it has no list.
    """
    from msgspec import UNSET, structs

    from tstitch_engines.bundle.identity import digest
    from tstitch_trt.cli._documents import (
        InspectedEngine,
        InspectedMember,
        InspectedPart,
        InspectOutput,
        PlanFacts,
    )
    from tstitch_trt.runtime.memory import planned_memory

    def inspected(record: EngineRecord) -> InspectedEngine:
        found, plan = layers.get(record.files[0].path), _plan(bundle, record)
        return InspectedEngine(
            **structs.asdict(record),
            digest=digest(record.identity),
            graphs=_graphs(record),
            layers=UNSET if found is None else None if isinstance(found, str) else found,
            no_layers=UNSET if found is None else found if isinstance(found, str) else None,
            plan=UNSET if plan is None else PlanFacts(version=plan.version, gpus=plan.gpus()),
        )

    def fields(network: Network) -> dict[str, Any]:
        return structs.asdict(network) | {"engines": tuple(map(inspected, network.engines))}

    manifest, files = bundle.manifest, bundle.manifest.components()
    whole = structs.asdict(manifest) | {
        "members": {name: InspectedMember(**fields(member)) for name, member in manifest.members.items()},
        "parts": {name: InspectedPart(**fields(part)) for name, part in manifest.parts.items()},
    }
    return InspectOutput(
        **whole,
        path=str(bundle.root),
        bytes=sum(part.bytes for part in files),
        files=len(files),
        memory=planned_memory(manifest),
        signed=_signed(bundle),
    )


def _print(bundle: Bundle) -> None:
    from tstitch_trt.cli._text import print_table, size
    from tstitch_trt.runtime.memory import planned_limits, planned_memory

    manifest = bundle.manifest
    latent, defaults = manifest.latent, manifest.defaults
    files = manifest.components()
    solver = defaults.solver + (f" ({_named(defaults.solver_options)})" if defaults.solver_options else "")
    drawn = f"{solver}, {defaults.steps} steps, spacing {defaults.spacing}, guidance {defaults.guidance:g}"
    # the pictures that can be asked for, of the engines that the default backend has
    sizes = next((limits.sizes() for limits in planned_limits(manifest).values()), "")
    entries = [
        ("latent", f"{latent.channels} x {latent.height} x {latent.width}, decoder {manifest.decoder.kind}"),
        ("noise", str(manifest.noise)),
        ("sizes", sizes),
        ("asked for", _conditioning(manifest)),
        ("names", ", ".join(manifest.conditioning.names)),
        ("defaults", f"{drawn}, schedule {defaults.schedule}"),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
        ("signed", _signed(bundle)),
        ("quality", "network and reference statistics" if manifest.quality else "none"),
        *(("note", note) for note in manifest.notes),
        ("files", f"{len(files)}, {size(sum(part.bytes for part in files))}, all verified"),
    ]
    for backend, parts in planned_memory(manifest).items():
        planned = ", ".join(f"{what} {size(nbytes)}" for what, nbytes in parts.items())
        entries.append(("memory", f"{planned} with {backend}; bench adds the activations"))
    print_entries(f"{bundle.root}: {manifest.name} (recipe {manifest.recipe}, schema {manifest.schema})", entries)
    for name, network in manifest.networks().items():
        click.echo()
        _print_network(bundle, name, network)
    click.echo()
    print_table(("file", "size", "sha256"), [(part.path, size(part.bytes), part.sha256) for part in files])


def _signed(bundle: Bundle) -> str:
    from tstitch_engines.bundle.signature import is_valid, read_signature
    from tstitch_engines.errors import Unavailable

    signature = read_signature(bundle.root)
    if signature is None:
        return "no"
    try:
        state = "" if is_valid(signature, bundle.content) else "NOT VALID for this manifest; it names the key "
    except Unavailable:
        state = 'not checked (pip install "tstitch-trt[sign]"); it names the key '
    return state + signature.fingerprint


def _named(options: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


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
    own += [f"noise {member.noise}"] if member.noise is not None else []
    own += [f"guidance scale as an input, {member.guidance_embedding} wide"] if member.guidance_embedding else []
    own += ["takes a ControlNet's residuals"] if member.controlled else []
    own += ["takes mask and masked picture"] if member.inpaints else []
    return [*said, *([("its own", "; ".join(own))] if own else [])]


def _plan(bundle: Bundle, record: EngineRecord) -> PlanHeader | None:
    """What the header of a TensorRT-RTX plan says; no other engine file has one."""
    from tstitch_engines.backends.tensorrt import read_plan_header

    return read_plan_header(bundle.path(record.files[0]))


def _graphs(record: EngineRecord) -> str:
    """The graph mode it runs in unless another is asked for, and why."""
    from tstitch_engines.backends import for_gpu

    if not for_gpu(record.identity.backend, record.identity.arch):
        return "off (the CPU has no graphs)"
    if record.identity.options.get("weight-streaming"):
        return "off (it streams weights, which allocates while it runs)"
    return "step (recorded when first run; bench says what could not be)"


def _origin(source: Source) -> str:
    from tstitch_engines.bundle.manifest import Origin

    if not isinstance(found := source.origin, Origin):
        return ""
    return f" from {found.repository}@{found.revision}, commit {found.commit}"


def _print_network(bundle: Bundle, name: str, network: Network) -> None:
    """A member or a part."""
    from tstitch_engines.bundle.identity import digest
    from tstitch_engines.bundle.manifest import Member
    from tstitch_trt.cli._text import size

    member = network if isinstance(network, Member) else None
    title = f"part {name}: {network.family}, {network.precision}"
    entries = []
    if network.config:
        entries.append(("config", ", ".join(f"{key} {value}" for key, value in network.config.items())))
    if member is not None:
        variance = ", learned variance" if member.learned_variance else ""
        title = f"member {name}: {member.family}, predicts {member.parametrisation}{variance}, {member.precision}"
        entries += _conventions(member)
    entries.append(("inputs", "; ".join(map(str, network.inputs))))
    entries.append(("outputs", "; ".join(map(str, network.outputs))))
    entries += [("source", f"{s.name} ({size(s.bytes)}, sha256 {s.sha256}){_origin(s)}") for s in network.sources]
    if member is not None and (made := member.quantisation) is not None:
        worst = max(made.loss, key=lambda level: level.rel_l2)
        text = (
            f"from {made.source_precision}: {len(made.layers)} layers in {member.precision} "
            f"({made.method} of {made.rows} inputs at timesteps {made.timesteps[0]:g} to {made.timesteps[1]:g}), the "
            f"others in {made.high_precision}; relative L2 of its output at most {worst.rel_l2:.1e} (timesteps "
            f"{worst.timesteps[0]:g} to {worst.timesteps[1]:g}), of final latents {max(made.latents):.1e}"
        )
        entries.append(("quantised", text))
    if (check := network.check) is not None:
        batches = ", ".join(map(str, check.batches))
        errors = f"max abs {check.max_abs:.1e}, relative L2 {check.rel_l2:.1e}"
        entries.append(("checked", f"against {check.against} at batch {batches}: {errors}"))
    for record in network.engines:
        identity = record.identity
        profile = ", ".join(f"{dim} {sizes}" for dim, sizes in identity.profile.dims.items())
        options = f", {_named(identity.options)}" if identity.options else ""
        built = f"{identity.backend} {identity.backend_version} for {identity.target}, {identity.precision}"
        if isinstance(record.driver, str):
            built += f", compiled with the driver {record.driver}"
        entries.append(("engine", f"{built}, profile {profile}{options}, identity {digest(identity)[:16]}"))
        entries += [(topic, text) for topic, text in record.notes.items()]
        entries.append(("graphs", _graphs(record)))
        if (plan := _plan(bundle, record)) is not None:
            entries.append(("plan", f"TensorRT-RTX {plan.version}, compute capability {plan.gpus()}"))
    print_entries(title, entries)
