"""What surrounds the names of a model's tensors: wrappers of training code, other copies of the model. No torch.

A known model is found by tensors that only it has, whatever stands before their names. Compiled, data-parallel, sharded
and Lightning modules, and those that hold a moving average of another one, thus read alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from tstitch_engines.errors import BadCheckpoint

__all__ = ["AVERAGES", "Unwrapped", "unwrap_names"]

# Put between the names of modules by torch.compile, FSDP and activation checkpointing, at any depth
_BETWEEN: Final = re.compile(
    r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_PARALLEL: Final = "module."
_AVERAGE: Final = re.compile(r"(^|[._])(ema|avg|averaged?|swa)([._]|$)")
_COUNTERS: Final = 3  # tensors beside a model that say nothing: steps, decay
AVERAGES: Final = "the moving average goes before the weights that it was made of"
# Where single files of whole pipelines keep a part; the names inside stay as they are.
_PARTS: Final = re.compile(
    r"(?:^|(?<=\.))(?:(?:model\.)?diffusion_model\.|control_model\.|first_stage_model\."
    r"|(?:(?:cond_stage_model|conditioner\.embedders\.\d)\.(?:transformer|model)\.)?(?:text_model\.)?)$"
)
_BESIDE: Final = frozenset({"first_stage_model", "cond_stage_model", "conditioner"})
_INSIDE: Final = "diffusion_model."  # the UNet's part of a whole pipeline, which is called model.diffusion_model.
_WRAPPERS: Final = frozenset({"module", "model", "net", "nnet", "network", "unet", "denoiser", "diffusion_model"})
_DENOISER, _CONTROLNET, _OTHER = range(3)  # a file is that of the first that it has
_ORIGINAL: Final = ("input_blocks.0.0.weight", "time_embed.0.weight")
# The tensors that tell a model, of which it has all, and its kind
_SIGNATURES: Final[tuple[tuple[tuple[str, ...], int], ...]] = (
    (_ORIGINAL, _DENOISER),  # latent diffusion's UNet; a ControlNet where it is in that part
    (("conv_in.weight", "time_embedding.linear_1.weight", "conv_out.weight"), _DENOISER),
    (("x_embedder.proj.weight", "pos_embed"), _DENOISER),  # DiT
    (("pos_embed.proj.weight", "proj_out_2.weight"), _DENOISER),  # diffusers' DiT
    (("patch_embed.proj.weight", "decoder_pred.weight"), _DENOISER),  # U-ViT
    (("img_in.weight", "txt_in.weight"), _DENOISER),  # Flux
    (("conv_in.weight", "time_embedding.linear_1.weight", "controlnet_cond_embedding.conv_in.weight"), _CONTROLNET),
    (("encoder.conv_in.weight", "decoder.conv_in.weight"), _OTHER),
    (("encoder.layers.0.weight", "decoder.layers.0.weight"), _OTHER),  # AutoencoderTiny
    (("embeddings.token_embedding.weight", "embeddings.position_embedding.weight"), _OTHER),
    (("token_embedding.weight", "positional_embedding"), _OTHER),  # OpenCLIP
)


@dataclass(frozen=True)
class Unwrapped:
    """``names``: stored name -> the model's own, of the tensors that are the model's.

    ``outside``: the same of other tensors (buffers of a trainer, other models), without the wrappers around the whole.
    ``notes``: what was left.
    """

    names: Mapping[str, str]
    outside: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Found:
    """A model whose tensors are called ``outer + part + ...``."""

    outer: str
    part: str
    kind: int
    original: bool


def unwrap_names(stored: Iterable[str], *, file: str) -> Unwrapped:
    """The names of the model in a ``file`` without what training code put around them.

    The parts of a whole pipeline are one model. Of several models a denoiser goes before a ControlNet, and that before
    a VAE or text encoder. Of several denoisers a moving average goes before the others, then the one without a prefix,
    then the one under a prefix that only wraps (``module.model.``). Raises ``BadCheckpoint`` where that leaves several.
    """
    cleaned = {name: _BETWEEN.sub("", name) for name in stored}
    found = _models(set(cleaned.values()))
    chosen = _choose(found, file)
    if chosen is None:
        parallel = all(name.startswith(_PARALLEL) for name in cleaned.values())
        return Unwrapped({key: name.removeprefix(_PARALLEL) if parallel else name for key, name in cleaned.items()})
    outer = chosen.outer
    nested = tuple({model.outer for model in found if model.outer.startswith(outer)} - {outer})
    names = {
        key: _in_part(name[len(outer) :], chosen)
        for key, name in cleaned.items()
        if name.startswith(outer) and not (nested and name.startswith(nested))
    }
    if len(set(names.values())) < len(names):
        twice = next(name for name, count in Counter(names.values()).items() if count > 1)
        raise BadCheckpoint(
            f"{file} holds {twice!r} twice under names that differ in what training code put around it alone",
            hint="save the model's own state dict",
        )
    outside = _outside(cleaned, names, outer)
    if chosen.original:  # an average of the UNet alone: the other parts of its pipeline are where they were
        held = {name.partition(".")[0] for name in names.values()}
        more = {key: name for key, name in outside.items() if name.partition(".")[0] in _BESIDE - held}
        names |= more
        outside = {key: name for key, name in outside.items() if key not in more}
    notes = []
    taken = f"the one under {outer!r}" if outer else "the one without a prefix"
    if copies := sorted({model.outer for model in found if model.kind == chosen.kind} - {outer}):
        rule = f", since {AVERAGES}" if _AVERAGE.search(outer) else ""
        notes.append(f"of the models in it {taken} is taken, not {', '.join(map(repr, copies))}{rule}")
    elif (left := len(cleaned) - len(names)) > _COUNTERS:
        notes.append(f"of the models in it {taken} is taken; {left} tensors are not its own")
    return Unwrapped(names, outside, tuple(notes))


def _outside(cleaned: Mapping[str, str], names: Mapping[str, str], outer: str) -> dict[str, str]:
    words = outer.split(".")[:-1]
    around = [".".join((*words[:cut], "")) for cut in range(len(words), 0, -1)]
    found = {}
    for key, name in cleaned.items():
        prefix = next((prefix for prefix in around if name.startswith(prefix)), "")
        if key not in names:
            found[key] = name[len(prefix) :]
    own = set(names.values())
    return {key: name for key, name in found.items() if name not in own}


def _in_part(name: str, model: _Found) -> str:
    """The UNet of latent diffusion is read where whole pipelines have it; other models have no such part."""
    if not model.part.endswith(_INSIDE) or not name.startswith(model.part):
        return name
    inside = name[len(model.part) :]
    return f"model.{_INSIDE}{inside}" if model.original else inside


def _models(names: set[str]) -> list[_Found]:
    found = []
    for signature, kind in _SIGNATURES:
        first = signature[0]
        for name in sorted(names):
            prefix = name[: -len(first)]
            if not name.endswith(first) or (prefix and not prefix.endswith(".")):
                continue
            if all(prefix + other in names for other in signature):
                part = _PARTS.search(prefix)
                cut = part.start() if part else len(prefix)
                inside = prefix[cut:]
                found.append(
                    _Found(
                        prefix[:cut],
                        inside,
                        _CONTROLNET if inside == "control_model." else kind,
                        signature is _ORIGINAL,
                    )
                )
    return found


def _choose(found: list[_Found], file: str) -> _Found | None:
    if not found:
        return None
    kind = min(model.kind for model in found)
    models = {model.outer: model for model in found if model.kind == kind}
    averages = [outer for outer in models if _AVERAGE.search(outer)]
    candidates = averages or list(models)
    if len(candidates) > 1 and "" not in candidates:
        wrapping = [outer for outer in candidates if all(map(_wraps, outer.split(".")[:-1]))]
        if len(wrapping) != 1 and kind == _OTHER:
            return None
        if len(wrapping) != 1:
            raise BadCheckpoint(
                f"{file} holds {len(candidates)} models of one kind, under {' and '.join(map(repr, candidates))}",
                hint="save the one that you mean in a file of its own",
            )
        candidates = wrapping
    return models["" if "" in candidates else candidates[0]]


def _wraps(word: str) -> bool:
    return word in _WRAPPERS or _AVERAGE.search(word) is not None
