"""What the fields of a manifest or recipe must say together, where each by itself is in its range."""

from __future__ import annotations

import re

from tstitch_engines.bundle.decode import DecodeError
from tstitch_engines.bundle.manifest import ComponentName, Conditioning, Defaults, Latent, Manifest, Member

__all__ = ["check_conventions", "check_manifest"]

_SEGMENT = re.compile(r"\s*([A-Za-z_][\w.-]*)")


def check_conventions(latent: Latent, conditioning: Conditioning, defaults: Defaults) -> None:
    """Raises ``DecodeError`` naming the field."""
    classes = conditioning.classes
    if (conditioning.kind == "class") != (classes > 0):
        raise DecodeError(
            f"conditioning of kind {conditioning.kind!r} with {classes} classes",
            'a class model has classes = N (and null = N with guidance); a text model has kind = "text" and neither',
        )
    if conditioning.names and len(conditioning.names) != classes:
        raise DecodeError(
            f"conditioning names {len(conditioning.names)} classes of {classes}",
            "list every class once, or leave names away",
        )
    if conditioning.null is not None and conditioning.null > classes:
        raise DecodeError(
            f"conditioning.null is {conditioning.null}; allowed is 0 to {classes}",
            "it is the label of the unconditional half, usually the number of classes",
        )
    if conditioning.null is not None and conditioning.kind == "text":
        raise DecodeError("conditioning.null is a label, and the model is conditioned on text", "leave it away")
    guided = defaults.guided_channels
    if guided is not None and guided > latent.channels:
        raise DecodeError(
            f"guided_channels is {guided}; allowed is 1 to {latent.channels}", "leave it away to guide all"
        )


def check_manifest(manifest: Manifest) -> None:
    """Raises ``DecodeError`` naming the field."""
    check_conventions(manifest.latent, manifest.conditioning, manifest.defaults)
    if manifest.decoder.kind == "vae" and ComponentName.VAE_DECODER not in manifest.parts:
        raise DecodeError("decoder.kind is 'vae', and there is no part vae_decoder", "")
    if both := sorted(manifest.members.keys() & manifest.parts.keys()):
        raise DecodeError(f"{both[0]!r} is a member and a part", "")
    stated = manifest.defaults.schedule != Defaults().schedule  # that of the record is for a pair called so
    for segment in manifest.defaults.schedule.split(",") if stated else ():
        named = _SEGMENT.match(segment)
        if named is None or named[1] not in manifest.members:
            raise DecodeError(
                f"defaults.schedule is {manifest.defaults.schedule[:80]!r}; the members are "
                f"{', '.join(manifest.members)}",
                "",
            )
    for name, network in manifest.networks().items():
        for number, engine in enumerate(network.engines):
            if missing := set(network.dims) - engine.identity.profile.dims.keys():
                raise DecodeError(f"the profile of engine {number} of {name!r} has no {sorted(missing)[0]}", "")
        if unknown := network.multiples.keys() - set(network.dims):
            raise DecodeError(f"multiples of {name!r} names {sorted(unknown)[0]!r}, which is no dimension of it", "")
    for name, member in manifest.members.items():
        _check_member(name, member, manifest)
    tokens = {
        spec.shape[1]
        for member in manifest.members.values()
        for spec in member.inputs
        if spec.name == "encoder_hidden_states"
    }
    if len(tokens) > 1:
        raise DecodeError(
            f"the members take texts of {' and '.join(map(str, tokens))} tokens; allowed is one number", ""
        )
    _check_paths(manifest)


def _check_member(name: str, member: Member, manifest: Manifest) -> None:
    inputs = {spec.name: spec for spec in member.inputs}
    if len(inputs) != len(member.inputs):
        raise DecodeError(f"two inputs of member {name!r} have one name", "")
    for wanted in ("sample", "timestep"):
        if wanted not in inputs:
            raise DecodeError(f"member {name!r} has no input {wanted}; it has {', '.join(inputs)[:200]}", "")
    stated = {
        "timestep_cond": ("guidance_embedding", member.guidance_embedding > 0),
        "inpaint": ("inpaints", member.inpaints),
        "encoder_hidden_states": ("text", member.text is not None),
    }
    for wanted, (field, says) in stated.items():
        if says and wanted not in inputs:
            stands = str(getattr(member, field))[:100]
            raise DecodeError(f"member {name!r} has no input {wanted}, and its {field} is {stands}", "")
    if 0 < member.guidance_embedding < 4:
        raise DecodeError(
            f"guidance_embedding of member {name!r} is {member.guidance_embedding}; allowed is 0, or 4 up", ""
        )
    _check_inputs(name, member, manifest.latent)
    latent = manifest.latent
    channels = latent.channels * (2 if member.learned_variance else 1)
    for spec, count in ((inputs["sample"], latent.channels), (member.outputs[0], channels)):
        sides = zip(spec.shape[2:], (latent.height, latent.width), strict=False)
        if (
            len(spec.shape) != 4
            or spec.shape[:2] != ("B", count)
            or any(isinstance(side, int) and side != size for side, size in sides)
        ):
            raise DecodeError(
                f"member {name!r}: {str(spec)[:200]} is not of the latent's shape [B, {count}, {latent.height}, "
                f"{latent.width}]",
                "",
            )


def _check_inputs(name: str, member: Member, latent: Latent) -> None:
    """The runtime lays its buffers out by these shapes, row by row; ``None`` stands for a dimension of any size."""
    text = member.text
    rest: dict[str, tuple[int | None, ...]] = {"timestep": (), "labels": (), "control_scale": ()}
    if text is not None:
        rest["encoder_hidden_states"] = (None, text.width)
        rest["text_embeds"] = (text.pooled_width,)
        rest["time_ids"] = ({"none": 0, "sizes": 6, "aesthetic": 5}[text.time_ids],)
    rest["timestep_cond"] = (member.guidance_embedding,)
    rest["inpaint"] = (1 + latent.channels, None, None)
    for spec in member.inputs:
        row, wanted = spec.shape[1:], rest.get(spec.name)
        fits = wanted is None or (
            len(row) == len(wanted) and all(want in (None, side) for side, want in zip(row, wanted, strict=True))
        )
        if spec.shape[:1] != ("B",) or "B" in spec.shape[1:] or not fits:
            shape = ", ".join(
                ["B", *("any" if want is None else str(want) for want in (("...",) if wanted is None else wanted))]
            )
            raise DecodeError(f"member {name!r}: {str(spec)[:200]} is not of the shape [{shape}]", "")


def _check_paths(manifest: Manifest) -> None:
    """One path is one file: hashes are compared by path."""
    seen: dict[str, tuple[str, int]] = {}
    files = [part for network in manifest.networks().values() for part in (*network.onnx, *network.files.values())]
    files += [part for network in manifest.networks().values() for e in network.engines for part in e.files]
    files += [manifest.quality.network, manifest.quality.reference] if manifest.quality else []
    for part in files:
        if seen.setdefault(part.path, (part.sha256, part.bytes)) != (part.sha256, part.bytes):
            raise DecodeError(f"the path {part.path!r} is named with two hashes or sizes", "")
