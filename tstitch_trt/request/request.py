"""A checked request: what each image is given, its seed, and where its trajectory starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.device.base import Buffer
from tstitch_engines.errors import BadInput, NotFinite
from tstitch_trt.plan.plan import Plan
from tstitch_trt.plan.step_rows import reads_before
from tstitch_trt.request.conditioning import Conditioning, Values, class_values, guidance_embedding
from tstitch_trt.request.controlnet import CONTROLNET, control_values
from tstitch_trt.request.init_image import Encoder, InitImage, check_start_wishes, make_start, read_control, read_image
from tstitch_trt.request.limits import Limits
from tstitch_trt.request.options import PictureWishes
from tstitch_trt.request.text import Texts, as_texts, check_text_wishes, text_count, text_values

__all__ = ["Request", "extent", "host_array"]

_SEED_LIMIT = 2**64


@dataclass(frozen=True)
class Request:
    """``seeds`` have one entry per image, so do ``labels`` of a class bundle and ``prompts`` where there are any.

    ``latents`` float32 ``[N,C,H,W]``, a device buffer or none: the state before step ``start``, or the unit noise to
    start from when ``from_noise``. ``control``: a ControlNet runs beside the members that take one. ``picture``: what
    the trajectory starts from, if it does.
    """

    labels: tuple[int, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    size: tuple[int, int]  # height and width of the latent
    latents: NDArray[np.float32] | Buffer | None
    start: int
    from_noise: bool
    conditioning: Conditioning
    control: bool = False
    picture: InitImage | None = None

    @property
    def n(self) -> int:
        return len(self.seeds)

    @staticmethod
    def make(
        manifest: Manifest,
        limits: Limits,
        plan: Plan,
        wishes: PictureWishes,
        *,
        start: int,
        texts: Texts | None = None,
        encoder: Encoder | None = None,
    ) -> Request:
        """``start``: the first step of ``plan`` that runs. Raises ``BadInput`` for anything that does not fit together.

        Encodes prompts and pictures, which runs engines.
        """
        guided = any(plan.guided)
        check_text_wishes(manifest, wishes, guided=guided)
        check_start_wishes(wishes)
        latents: Any = wishes.get("latents")
        channels = 3 if manifest.decoder.kind != "pixel" else manifest.latent.channels
        pictures = read_image(wishes.get("image"), channels)
        control = read_control(wishes.get("control"))
        size = _size(manifest, limits, wishes, pictures, control)
        labels, count = _count(manifest, wishes, latents, 1 if pictures is None else len(pictures))
        seeds = _seeds(wishes, count)
        if latents is not None:
            latents = _check_latents(manifest, size, latents)
        picture = None
        if pictures is not None:
            picture = make_start(manifest, encoder, wishes, pictures, seeds, size, latents)
            latents = None
        from_noise = start == 0 and picture is None
        if picture is not None:
            whole = start == 0 and picture.mask is not None  # diffusers: nothing of the picture is left in the noise
            latents = picture.noise if whole else picture.state(float(plan.table.a[start]), float(plan.table.s[start]))
            from_noise = whole
        conditioning = _conditioning(manifest, plan, wishes, labels, texts, size, picture, control)
        prompts = () if wishes.get("prompt") is None else as_texts(wishes["prompt"], what="prompt")
        return Request(
            labels,
            tuple(prompts[i % len(prompts)] for i in range(count)) if prompts else (),
            seeds,
            size,
            latents,
            start,
            from_noise,
            conditioning,
            control is not None,
            picture,
        )

    def check_start(self, plan: Plan) -> None:
        """A trajectory can be entered in the middle where no row reads estimates from before."""
        if self.start == 0:
            return
        if not 0 <= self.start < len(plan.schedule):
            raise BadInput(
                f"start_step {self.start} is outside 0..{len(plan.schedule) - 1}", hint="0 starts from noise"
            )
        if self.latents is None:
            raise BadInput(
                f"start_step {self.start} without latents: there is no state to start from",
                hint="pass latents= with the state before that step, or start_step=0",
            )
        if reads_before(plan.rows, self.start):
            raise BadInput(
                f"start_step {self.start}: the solver needs the estimates of the steps before",
                hint="use a single-step solver (ddim, ddpm, euler, lcm) to enter a trajectory in the middle",
            )


def host_array(array: Any) -> NDArray[np.generic]:
    """``array`` as a numpy array, without a copy where it can be. Raises ``BadInput``."""
    try:
        if hasattr(array, "__dlpack__") and not isinstance(array, (np.ndarray, np.generic)):
            viewed: NDArray[np.generic] = np.from_dlpack(array)
            return viewed
        return np.asarray(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise BadInput(
            f"a {type(array).__name__} can't be read as latents: {error}",
            hint="pass float32 [N,C,H,W]: a numpy array, or in torch tensor.detach()",
        ) from error


# --- how many, and which


def extent(manifest: Manifest, limits: Limits, wishes: PictureWishes) -> tuple[int, tuple[int, int]]:
    """How many images a request is for, and height and width of their latents. Raises as ``Request.make`` does.

    Reads shapes only: nothing is encoded.
    """
    latents: Any = wishes.get("latents")
    if latents is not None and not hasattr(latents, "shape"):
        wishes = {**wishes, "latents": host_array(latents)}
        latents = wishes["latents"]
    channels = 3 if manifest.decoder.kind != "pixel" else manifest.latent.channels
    pictures = read_image(wishes.get("image"), channels)
    size = _size(manifest, limits, wishes, pictures, read_control(wishes.get("control")))
    return _count(manifest, wishes, latents, 1 if pictures is None else len(pictures))[1], size


def _count(manifest: Manifest, wishes: PictureWishes, latents: Any, pictures: int) -> tuple[tuple[int, ...], int]:
    """The labels of a class bundle, one per image, and how many images there are."""
    labels, seeds, n = wishes.get("labels"), wishes.get("seeds"), wishes.get("n")
    classes = manifest.conditioning.classes
    of_classes = manifest.conditioning.kind == "class"
    wanted: list[int] = []
    if of_classes:
        wanted = list(range(classes)) if labels is None else [labels] if isinstance(labels, int) else list(labels)
    counts = {
        "n": n,
        "seeds": None if seeds is None else len(seeds),
        "latents": None if latents is None or not latents.shape else int(latents.shape[0]),
    }
    given = {name: count for name, count in counts.items() if count is not None}
    implied = (1 if labels is None else len(wanted)) if of_classes else text_count(wishes)
    count = next(iter(given.values()), max(implied, pictures) if wanted or not of_classes else 0)
    if len(set(given.values())) > 1:
        raise BadInput(
            "these do not agree on the number of images: " + ", ".join(f"{k}: {v}" for k, v in given.items()),
            hint="give one seed and one latent per image, or leave n out",
        )
    if count < 1 or (of_classes and not wanted):
        what = f" of {len(wanted)} labels" if of_classes else ""
        raise BadInput(f"{count} images{what}: nothing to draw", hint="ask for at least one, e.g. n=1")
    for label in wanted:
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < classes:
            raise BadInput(
                f"label {label!r} is out of range; allowed is 0 to {classes - 1}",
                hint=f"e.g. --labels 0-{classes - 1} or labels=[0, {classes - 1}]",
            )
    return tuple(int(wanted[i % len(wanted)]) for i in range(count)) if of_classes else (), count


def _seeds(wishes: PictureWishes, count: int) -> tuple[int, ...]:
    seed, seeds = wishes.get("seed", 0), wishes.get("seeds")
    chosen: Sequence[int] = [seed + i for i in range(count)] if seeds is None else list(seeds)
    for value in chosen:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < _SEED_LIMIT:
            raise BadInput(
                f"seed {value!r} is out of range; allowed are whole numbers from 0 to 2**64 - 1", hint="e.g. --seed 0"
            )
    return tuple(int(value) for value in chosen)


def _size(
    manifest: Manifest,
    limits: Limits,
    wishes: PictureWishes,
    pictures: NDArray[Any] | None,
    control: NDArray[np.float32] | None,
) -> tuple[int, int]:
    """Height and width of the latent: as asked for, else those of what was given, else the bundle's own."""
    factor = manifest.decoder.factor
    found: dict[str, tuple[int, int]] = {}
    if pictures is not None:
        of_latents = pictures.dtype.kind == "f"
        rows, columns = pictures.shape[2:] if of_latents else pictures.shape[1:3]
        found["image"] = (rows * factor, columns * factor) if of_latents else (rows, columns)
    if control is not None:
        found["control"] = (control.shape[2], control.shape[3])
    height, width = wishes.get("height"), wishes.get("width")
    latents: Any = wishes.get("latents")
    if found:
        first = next(iter(found.values()))
        height, width = first[0] if height is None else height, first[1] if width is None else width
    elif latents is not None and len(latents.shape) == 4 and height is None and width is None and _dynamic(limits):
        height, width = int(latents.shape[2]) * factor, int(latents.shape[3]) * factor
    size = limits.latent_size(height, width)
    pixels = (size[0] * factor, size[1] * factor)
    for what, given in found.items():
        if given != pixels:
            raise BadInput(
                f"{what} is {given[1]}x{given[0]} pixels and the picture is to be {pixels[1]}x{pixels[0]} (width x "
                "height); both must be equal",
                hint=f"resize {what}, or ask for its size: width={given[1]}, height={given[0]}",
            )
    return size


def _dynamic(limits: Limits) -> bool:
    return any(side.min != side.max for sides in limits.sides.values() for side in sides.values())


# --- what it is given


def _conditioning(
    manifest: Manifest,
    plan: Plan,
    wishes: PictureWishes,
    labels: tuple[int, ...],
    texts: Texts | None,
    size: tuple[int, int],
    picture: InitImage | None,
    control: NDArray[np.float32] | None,
) -> Conditioning:
    names = list(dict.fromkeys(plan.schedule.names))
    factor = manifest.decoder.factor
    networks: dict[str, dict[str, Values]]
    if manifest.conditioning.kind == "class":
        shared = class_values(manifest, labels)
        networks = {name: {"labels": shared} for name in names}
    else:
        pixels = (size[0] * factor, size[1] * factor)
        networks = text_values(manifest, names, wishes, texts, guided=any(plan.guided), pixels=pixels)
    for name in names:
        member = manifest.members[name]
        if name in plan.embedded:
            networks[name]["timestep_cond"] = Values(guidance_embedding(plan.embedded[name], member.guidance_embedding))
        if member.inpaints:
            if picture is None or picture.mask is None or picture.outside is None:
                raise BadInput(
                    f"member {name!r} paints into a picture, and there is no picture or no mask",
                    hint="add image= and mask= (--image FILE --mask FILE)",
                )
            known = np.float32(member.latent_ratio) * picture.outside
            networks[name]["inpaint"] = Values(np.concatenate([picture.mask, known], axis=1))
    if control is not None:
        networks[CONTROLNET] = control_values(manifest, names, wishes, control, networks)
    elif wishes.get("control_scale") is not None:
        raise BadInput("control_scale was given without a control picture", hint="add control= (--control FILE)")
    conditioning = Conditioning(networks)
    conditioning.check(manifest)
    return conditioning


def _check_latents(
    manifest: Manifest, size: tuple[int, int], latents: NDArray[np.generic] | Buffer
) -> NDArray[np.float32] | Buffer:
    """What lies on the device is not looked into: the steps find what is not finite."""
    want = (manifest.latent.channels, *size)
    on_host = isinstance(latents, np.ndarray)
    number = np.issubdtype(latents.dtype, np.floating) if on_host else latents.dtype == "float32"
    if len(latents.shape) != 4 or latents.shape[1:] != want or not number:
        raise BadInput(
            f"latents are {latents.dtype}{list(latents.shape)}; needed is float32[N, {', '.join(map(str, want))}]",
            hint="give one [C,H,W] array of standard normal noise per image",
        )
    if not isinstance(latents, np.ndarray):
        return latents
    checked = np.ascontiguousarray(latents, np.float32)
    if not np.isfinite(checked).all():
        bad = int(np.flatnonzero(~np.isfinite(checked).reshape(len(checked), -1).all(axis=1))[0])
        raise NotFinite(
            f"NaN or infinity in the latents given for image {bad}, before the first step",
            hint="check the file or array that was passed as latents",
        )
    return checked
