"""The sizes that all members of a bundle can run: how many lanes, which latents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.checks import check_text, check_whole, read_pair
from tstitch_engines.errors import OutOfProfile
from tstitch_engines.spec import Range, ShapeProfile

__all__ = ["MOST_IMAGES", "MOST_SEED", "Limits", "Sizes", "check_prompt", "check_sides", "network_sizes"]

Sizes = tuple[tuple[str, int], ...]
"""The sizes of a network's dynamic dimensions other than the batch, in the order of their names. Empty: it has none."""

MOST_IMAGES: Final = 100_000  # in one request, and so labels, prompts and seeds
MOST_SEED: Final = 2**63 - 1  # of studies, whose records keep it; sample takes twice as many
_LONGEST_TEXT: Final = 20_000  # characters; text encoders read some hundreds
_MOST_PIXELS: Final = 1_000_000  # along one side
_SIDES: Final = {"H": ("height", 2), "W": ("width", 3)}  # name of the latent's side, its place in [B,C,H,W]


def check_prompt(value: object, what: str) -> str:
    """A text that text encoders may be given."""
    return check_text(value, what, example="a red fox", most=_LONGEST_TEXT)


def check_sides(value: object, what: str) -> tuple[int, int]:
    """Height and width of latents."""
    height, width = read_pair(value, what, "are height and width of latents", "[(32, 32)]")
    return check_whole(height, what, 1, _MOST_PIXELS), check_whole(width, what, 1, _MOST_PIXELS)


@dataclass(frozen=True)
class Limits:
    """What the profiles of a bundle's members have in common.

    ``batch``: lanes, both halves counted. ``sides``: latent height and width by member (``H``, ``W``). ``tokens``: the
    largest ``T`` of each network that has it dynamic.
    """

    manifest: Manifest
    batch: Range
    sides: Mapping[str, Mapping[str, Range]]
    tokens: Mapping[str, Range]

    @staticmethod
    def of(manifest: Manifest, profiles: Mapping[str, ShapeProfile]) -> Limits:
        """``profiles``: of every member, and of the ControlNet if it is to run. Raises ``OutOfProfile``."""
        limits = {name: profile.dims["B"] for name, profile in profiles.items()}
        floor, most = max(limit.min for limit in limits.values()), min(limit.max for limit in limits.values())
        if floor > most:
            raise OutOfProfile(
                f"the members' batch profiles {[str(limit) for limit in limits.values()]} have no size in common",
                hint="build all members with one --batch MIN:OPT:MAX",
            )
        networks = manifest.networks()
        sides: dict[str, dict[str, Range]] = {}
        for name, profile in profiles.items():
            shape = next(spec.shape for spec in networks[name].inputs if spec.name == "sample")
            sides[name] = {}
            for dim, (_, place) in _SIDES.items():
                fixed = shape[place]
                sides[name][dim] = Range(fixed, fixed, fixed) if isinstance(fixed, int) else profile.dims[dim]
        tokens = {name: profile.dims["T"] for name, profile in profiles.items() if "T" in profile.dims}
        return Limits(manifest, Range(floor, most, most), sides, tokens)

    @property
    def native(self) -> tuple[int, int]:
        return self.manifest.latent.height, self.manifest.latent.width

    @property
    def largest(self) -> tuple[int, int]:
        """Height and width of the largest latent. Raises ``OutOfProfile`` when no size suits all members."""
        low, high = self._range("H"), self._range("W")
        if low is None or high is None:
            raise OutOfProfile(
                f"the members have no latent size in common: {self._allowed()}",
                hint="build all members with one --height and --width MIN:OPT:MAX",
            )
        return low.max, high.max

    def native_or_largest(self) -> tuple[int, int]:
        """The bundle's own latent size where all members run it, else the largest one that they do."""
        ranges = ((self._range(dim), own) for dim, own in zip(_SIDES, self.native, strict=True))
        fits = all(allowed is not None and allowed.min <= own <= allowed.max for allowed, own in ranges)
        return self.native if fits else self.largest

    def check_batch(self, batch: int) -> None:
        """Raises ``OutOfProfile`` for a batch that some member's engine was not built for."""
        ShapeProfile({"B": self.batch}).check({"B": batch}, what="engine")

    def largest_of(self, name: str) -> dict[str, int]:
        """The largest size of every dimension of network ``name``."""
        height, width = self.largest
        tokens = {"T": self.tokens[name].max} if name in self.tokens else {}
        return {"B": self.batch.max, "H": height, "W": width, **tokens}

    def latent_size(self, height: object, width: object) -> tuple[int, int]:
        """Height and width of the latent for a picture of ``height x width`` pixels; ``None`` is the bundle's own.

        Raises ``BadInput`` for a size that is no multiple, ``OutOfProfile`` for one that a member was not built for.
        """
        factor = self.manifest.decoder.factor
        found = []
        for dim, asked, own in zip(_SIDES, (height, width), self.native, strict=True):
            word, allowed = _SIDES[dim][0], self._range(dim)
            if asked is None and allowed is not None and allowed.min <= own <= allowed.max:
                found.append(own)
                continue
            pixels = check_whole(own * factor if asked is None else asked, word, 1, _MOST_PIXELS, example=own * factor)
            step = factor * self.multiple(dim)
            if allowed is None or not allowed.min * factor <= pixels <= allowed.max * factor:
                raise OutOfProfile(
                    f"{word} {pixels} is outside what was built: {self._allowed()}",
                    hint=f"ask for a size that all members allow, or build again with a wider --{word} MIN:OPT:MAX",
                )
            if pixels % step:
                around = (pixels // step * step, -(-pixels // step) * step)
                fitting = [str(near) for near in around if allowed.min * factor <= near <= allowed.max * factor]
                raise OutOfProfile(
                    f"{word} {pixels} is no multiple of {step} pixels; allowed are such multiples: {self._allowed()}",
                    hint=f"ask for {word} {' or '.join(fitting) or 'another multiple'}",
                )
            found.append(pixels // factor)
        return found[0], found[1]

    def multiple(self, dim: str) -> int:
        """What ``H`` or ``W`` of the latent must be a multiple of."""
        networks = self.manifest.networks()
        return math.lcm(*(networks[name].multiples.get(dim, 1) for name in self.sides))

    def _range(self, dim: str) -> Range | None:
        ranges = [sides[dim] for sides in self.sides.values()]
        low, high = max(r.min for r in ranges), min(r.max for r in ranges)
        return Range(low, high, high) if low <= high else None

    @property
    def most_tokens(self) -> int:
        """The largest ``T`` that every network with text takes; 0 where none has text."""
        networks, key = self.manifest.networks(), "encoder_hidden_states"
        shapes = {name: spec.shape for name in self.sides for spec in networks[name].inputs if spec.name == key}
        fixed = [shape[1] for shape in shapes.values() if isinstance(shape[1], int)]
        return min([*fixed, *(self.tokens[name].max for name in shapes if name in self.tokens)], default=0)

    def sizes(self) -> str:
        """The sizes that all networks allow, as ``256..1024 x 512 (height x width in pixels), multiples of 64 x 8``."""
        height, width = self._range("H"), self._range("W")
        if height is None or width is None:
            return f"none in common: {self._allowed()}"
        steps = [self.manifest.decoder.factor * self.multiple(dim) for dim in _SIDES]
        moving = height.min != height.max or width.min != width.max
        text = f"{self._side(height)} x {self._side(width)} (height x width in {self._unit()})"
        return text + (f", in multiples of {steps[0]} x {steps[1]}" if moving else "")

    def _unit(self) -> str:
        known = self.manifest.decoder.factor > 1 or self.manifest.decoder.kind != "none"
        return "pixels" if known else "latent elements"

    def _side(self, side: Range) -> str:
        low, high = side.min * self.manifest.decoder.factor, side.max * self.manifest.decoder.factor
        return str(low) if low == high else f"{low}..{high}"

    def _allowed(self) -> str:
        """``'small' 256..1024 x 512, 'large' 256..512 x 512 (height x width in pixels)``: every network's own."""
        parts = [f"{name!r} {self._side(sides['H'])} x {self._side(sides['W'])}" for name, sides in self.sides.items()]
        return f"{', '.join(parts)} (height x width in {self._unit()})"


def network_sizes(name: str, profile: ShapeProfile, height: int, width: int, tokens: int) -> Sizes:
    """The sizes of a network's dynamic dimensions. Raises ``OutOfProfile`` for too many or too few tokens."""
    given = {"H": height, "W": width, "T": tokens}
    found = tuple((dim, given[dim]) for dim in sorted(profile.dims) if dim != "B")
    profile.check(dict(found), what=f"engine of {name!r}")
    return found
