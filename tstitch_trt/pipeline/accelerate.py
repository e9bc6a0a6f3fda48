"""A loaded diffusers pipeline and a small denoiser, as one object that is called like the pipeline."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tstitch_engines.backends import open_backend
from tstitch_engines.bundle.bundle import Bundle, is_bundle, open_bundle
from tstitch_engines.bundle.files import remove_stale, temporary_directory
from tstitch_engines.bundle.identity import digest
from tstitch_engines.bundle.manifest import ComponentName
from tstitch_engines.bundle.scheduler_config import read_training
from tstitch_engines.checks import (
    check_callable,
    check_choice,
    check_path,
    check_precision,
    check_switch,
    check_text,
    checked,
    optional,
    plain_number,
    read_mapping,
    taken_as_is,
)
from tstitch_engines.child import Limits
from tstitch_engines.child.limits import parse_size
from tstitch_engines.errors import BadBundle, BadEngine, BadInput, BadSchedule, Unavailable
from tstitch_engines.progress import Progress, silent
from tstitch_engines.spec import Range
from tstitch_engines.threads import check_threads
from tstitch_engines.version import VERSION
from tstitch_trt.pipeline.bundle_cache import kept_root, touch
from tstitch_trt.pipeline.callers_words import in_callers_words, notes_in_callers_words, reworded
from tstitch_trt.pipeline.checkpoint import (
    conventions_said,
    module_hash,
    path_hash,
    save_large,
    save_small,
)
from tstitch_trt.pipeline.code_origin import library_base
from tstitch_trt.pipeline.kinds import kind_of
from tstitch_trt.pipeline.own_code import scheduler_class
from tstitch_trt.pipeline.pipeline import AcceleratedPipeline
from tstitch_trt.pipeline.stock import StockModule, check_stock
from tstitch_trt.pipeline.text_encoder_check import check_text_encoders, check_text_inputs
from tstitch_trt.pipeline.wrapped import unwrap_compiled
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.plan.schedule import ROUNDINGS, check_fraction, check_rounding
from tstitch_trt.runtime.chooser import ChooserFactory
from tstitch_trt.runtime.load import load
from tstitch_trt.runtime.work_queue import check_timeout

if TYPE_CHECKING:
    from tstitch_engines.bundle.manifest import Precision
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["accelerate"]

_log = logging.getLogger(__name__)

_SCHEMA: Final = 3  # part of every bundle's key
_STAGING: Final = "saving-"
_PRECISIONS: Final[Mapping[str, Precision]] = {
    "torch.float32": "fp32",
    "torch.float16": "fp16",
    "torch.bfloat16": "bf16",
}
RangeLike = int | str | Range | None
_BATCH: Final = Range(1, 2, 8)


def _range(value: object, what: str) -> Range:
    """The range of a dimension."""
    number = plain_number(value)
    if isinstance(value, Range):
        return value
    text = str(number) if isinstance(number, int) and abs(number) < 2**31 else value
    try:
        return Range.parse(check_text(text, what, example="1:2:8", most=100), option=f"--{what}")
    except BadInput as error:
        raise BadInput(f"{what}: {error.message}", hint=reworded(error.hint)) from None


@checked(
    pipe=taken_as_is,
    small=taken_as_is,
    schedule=optional(partial(check_text, example="small:0.4,large")),
    fraction=optional(check_fraction),
    rounding=optional(partial(check_choice, allowed=ROUNDINGS)),
    backend=partial(check_text, example="onnxruntime", most=100),
    device=optional(partial(check_text, example="cuda", most=100)),
    precision=optional(check_precision),
    batch=_range,
    height=optional(_range),
    width=optional(_range),
    tokens=optional(_range),
    options=optional(partial(read_mapping, example='{"small.controlled": False}')),
    cache=optional(check_path),
    fresh=check_switch,
    threads=optional(check_threads),
    time_limit=taken_as_is,
    memory_limit=taken_as_is,
    max_memory=optional(partial(parse_size, example="max_memory=8GiB")),
    progress=optional(check_callable),
    chooser=optional(check_callable),
    timeout=check_timeout,
)
def accelerate(
    pipe: Any,
    *,
    small: Any,
    schedule: str | None = None,
    fraction: float | None = None,
    rounding: str | None = None,
    backend: str = "onnxruntime",
    device: str | None = None,
    precision: Precision | Mapping[str, Precision] | None = None,
    batch: RangeLike = _BATCH,
    height: RangeLike = None,
    width: RangeLike = None,
    tokens: RangeLike = None,
    options: Mapping[str, int | float | bool | str] | None = None,
    cache: str | Path | None = None,
    fresh: bool = False,
    threads: int | None = None,
    time_limit: float | str | None = None,
    memory_limit: int | str | None = None,
    max_memory: int | str | None = None,
    progress: Progress | None = None,
    chooser: ChooserFactory | None = None,
    timeout: float | None = None,
) -> AcceleratedPipeline:
    """T-Stitch for a diffusers pipeline: ``small`` takes the early steps, the pipeline's own UNet the late ones.

        pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5", torch_dtype=torch.float16)
        fast = tstitch_trt.accelerate(pipe, small="bk-sdm-tiny", fraction=0.4)
        image = fast("an astronaut riding a horse", num_inference_steps=50).images[0]
        image = fast("an astronaut riding a horse", fraction=0.5).images[0]

    ``pipe``: a Stable Diffusion or Stable Diffusion XL pipeline for text to image, image to image or inpainting, also
    with a ControlNet, or a latent consistency one. What is loaded counts and not where it came from: fused LoRAs and
    trained weights are in it. ``small``: the path of a pipeline, of a UNet's folder or of a single file, a Hugging
    Face repository with one of them (``ORG/NAME``, as in ``tstitch-trt build``), or a loaded UNet of diffusers. One
    that says nothing of its conventions is taken to follow the pipeline's, but a single file only where those are the
    usual ones; ``options={"small.prediction": "v"}`` (``small.noise``, ``small.zero_snr``) says them. Both read the
    pipeline's text encoders, so a small pipeline with others is refused.

    The denoisers, the VAE and the ControlNet become engines; prompts are read by the pipeline's own text encoders, so
    that all that these can do works as before. Noise comes from ``generator`` as the pipeline draws it, and the
    scheduler is ``pipe.scheduler`` at the time of each call: equal seeds give the pipeline's own pictures at
    ``fraction=0``. Solvers that add noise in every step draw that noise themselves, from seeds out of ``generator``.

    ``schedule`` or ``fraction`` (0.4 of the steps where neither is given) are those of calls that say nothing else,
    ``rounding`` (see ``tstitch_trt.plan.schedule.resolve``) that of their fractions, and of those of calls that say no
    other; the members are called ``small`` and ``large``. ``backend``, ``device`` (the pipeline's), ``precision`` (the
    pipeline's) and ``options`` as in ``tstitch-trt build``: ``options={"small.controlled": False}`` lets a small UNet
    that the ControlNet does not fit run without it. ``batch``: images that run together, twice as many with guidance;
    ``height`` and ``width`` in pixels, by default the model's own size only; ``tokens`` of prompts, by default up to
    231. Each is a number, ``"MIN:OPT:MAX"`` or a ``Range``.

    The bundle is kept in the folder ``cache`` (by default in tstitch-trt's cache, where ``tstitch-trt cache`` shows
    and prunes it) under the hash of all weights and options, and used again when they are the same; ``fresh`` builds
    it again. ``progress`` gets phase and share done; without it a bar shows them on a terminal. ``time_limit`` and
    ``memory_limit`` of each network's compilation: see ``tstitch_export.build``; ``max_memory``, ``chooser`` and
    ``timeout``: see ``tstitch_trt.load``.

    Raises ``BadInput`` and its kinds for a pipeline or a pair that can't be accelerated, before anything is built.
    """
    kind = kind_of(pipe)
    if schedule is not None and fraction is not None:
        raise BadSchedule("both schedule and fraction are given", hint="a fraction is a short schedule: give one")
    if rounding is not None and schedule is not None:
        check_rounding(rounding, schedule, ("small", "large"))
    with in_callers_words():
        Limits.of(time_limit, memory_limit)
        open_backend(backend)
        small = _located(small, progress or silent) if isinstance(small, str | Path) else small
        own = _check_small(small, dict(options or {}))
        small = unwrap_compiled(small)
        stock = _stock_modules(pipe)
        scheduler_class(pipe.scheduler)
        if isinstance(small, Path):
            check_text_encoders(small, pipe)
        check_text_inputs(own, stock["unet"].config)
        settings: dict[str, Any] = {
            "backend": backend,
            "device": device or str(pipe._execution_device),  # that of offloaded pipelines too
            "precision": precision or _precision(pipe),
            "profile": batch,
            "height": height,
            "width": width,
            "tokens": tokens,
            "options": dict(options or {}),
        }
        root = kept_root() if cache is None else Path(cache)
        output = root / f"{_key(pipe.scheduler, stock, small, kind.recipe, settings)}.bundle"

        def opened() -> Runtime:
            return load(
                _bundle(output),
                device=settings["device"],
                backend=backend,
                threads=threads,
                max_memory=max_memory,
                chooser=chooser,
                timeout=timeout,
            )

        runtime = None
        if not fresh and is_bundle(output):
            try:
                runtime = opened()
            except (BadBundle, BadEngine) as error:
                _log.warning("the bundle %s is built again: %s", output, error.message)
        if runtime is None:
            limits = {"time_limit": time_limit, "memory_limit": memory_limit}
            _build(pipe, small, kind.recipe, {**settings, **limits}, output, fresh, progress)
            runtime = opened()
        touch(output)
    chosen = PlanOptions(
        schedule=schedule, fraction=0.4 if schedule is None and fraction is None else fraction, rounding=rounding
    )
    return AcceleratedPipeline(pipe, runtime, chosen, stock)


def _located(small: str | Path, progress: Progress) -> Path:
    """Where a small model on disk or of Hugging Face is, with the text encoders that are compared."""
    from tstitch_export.hub.checkpoints import Checkpoints

    checkpoints = Checkpoints(progress)
    path = checkpoints.locate(small, "member")
    for part in (ComponentName.TEXT_ENCODER, ComponentName.TEXT_ENCODER_2):
        checkpoints.add(path, part)
    return path


def _stock_modules(pipe: Any) -> dict[str, StockModule]:
    """The modules that become engines, by their names in the pipeline."""
    found = {}
    for name in ("unet", "vae", "controlnet"):
        module = getattr(pipe, name, None)
        if module is not None:
            found[name] = check_stock(module, f"the pipeline's {name}")
        elif name != "controlnet":
            raise BadInput(f"the pipeline has no {name}", hint=f"give it one: pipe.{name} = ...")
    return found


def _check_small(small: Any, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Its configuration."""
    said = conventions_said(options)
    if isinstance(small, Path):
        if not small.exists():
            raise BadInput(
                f"small = {small} does not exist",
                hint="give the path of a pipeline, a UNet's folder or a single file, the Hugging Face repository "
                "(ORG/NAME) of one, or a loaded UNet2DConditionModel",
            )
        from tstitch_export.families.unet.source import read_unet

        return read_unet(small, said).config
    module = unwrap_compiled(small)
    if library_base(type(module)).__name__ != "UNet2DConditionModel":
        raise BadInput(
            f"small is a {type(small).__name__}; allowed is a path or a UNet2DConditionModel",
            hint="of a loaded pipeline give its UNet: small=pipeline.unet",
        )
    check_stock(small, "the small UNet")
    config: Mapping[str, Any] = module.config
    return config


def _precision(pipe: Any) -> Precision:
    found = str(pipe.unet.dtype)
    if found not in _PRECISIONS:
        raise BadInput(f"the pipeline's UNet is {found}; known are {', '.join(_PRECISIONS)}", hint="give precision=")
    return _PRECISIONS[found]


def _key(scheduler: Any, stock: Mapping[str, StockModule], small: Any, recipe: str, settings: Mapping[str, Any]) -> str:
    """The hash of all that decides the bundle."""
    from tstitch_export.build import versions_of

    config = {**scheduler.config, "_class_name": scheduler_class(scheduler)}
    noise, prediction = read_training(config, where="the pipeline's scheduler")
    return digest(
        {
            "schema": _SCHEMA,
            "recipe": recipe,
            "small": path_hash(small) if isinstance(small, Path) else module_hash(small),
            "parts": {name: module_hash(one.module) for name, one in stock.items()},
            "trained": {"noise": noise, "prediction": prediction},
            "settings": {key: str(value) for key, value in settings.items()},
            "versions": {"tstitch-trt": VERSION} | versions_of(("torch", "diffusers", "onnx", "onnxscript")),
        }
    )


def _build(
    pipe: Any, small: Any, recipe: str, settings: dict[str, Any], output: Path, fresh: bool, progress: Progress | None
) -> None:
    from tstitch_export.build import build
    from tstitch_trt.progress import progress_bar

    remove_stale(output.parent, _STAGING)
    shown = nullcontext() if progress else progress_bar("accelerating", 1, logs=("tstitch_engines", "tstitch_export"))
    with (
        temporary_directory(output.parent, _STAGING) as staging,
        shown as bar,
        in_callers_words(_names(staging, small)),
        notes_in_callers_words(),
    ):
        report = progress or bar or silent
        report("saving the pipeline", 0.0)
        parts = save_large(pipe, staging / "large")
        first = save_small(small, pipe, staging / "large", staging / "small", conventions_said(settings["options"]))
        build(
            recipe,
            members={"small": first, "large": staging / "large"},
            parts=parts,
            output=output,
            fresh=fresh,
            progress=report,
            **settings,
        )


def _names(staging: Path, small: Any) -> dict[str, str]:
    """What is saved where: paths that nobody but the build knows."""
    found = {f"{staging}/large/{name}": f"the pipeline's {name}" for name in ("unet", "vae", "scheduler")}
    own = str(small) if isinstance(small, Path) else "the small UNet"
    found |= dict.fromkeys((f"{staging}/small/unet", f"{staging}/small"), own)
    return {**found, f"{staging}/large": "the pipeline", f"{staging}/controlnet": "the pipeline's controlnet"}


def _bundle(path: Path) -> Bundle:
    """The bundle, without the defaults that were its pipeline's scheduler: every call brings its own."""
    import msgspec

    from tstitch_engines.bundle.manifest import Defaults

    opened = open_bundle(path)
    if ComponentName.VAE_DECODER not in opened.manifest.parts:
        raise Unavailable(f"the bundle {path} has no VAE", hint="give the pipeline its vae")
    plain = Defaults(schedule="small:0.4,large")
    opened.manifest = msgspec.structs.replace(opened.manifest, defaults=plain)
    return opened
