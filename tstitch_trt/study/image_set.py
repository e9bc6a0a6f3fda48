"""The images that a study draws: the seed and the class or prompt of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.request.synthetic import PROMPTS, reads_prompts, synthetic_painting

__all__ = ["ImageSet", "image_keywords", "prompts_for"]


@dataclass(frozen=True)
class ImageSet:
    """``samples`` images. Image ``i`` has the seed ``seed + i`` and the class or prompt ``i % count``."""

    samples: int
    seed: int = 0
    prompts: tuple[str, ...] = ()

    def keywords(self, manifest: Manifest, start: int, stop: int, names: Iterable[str]) -> dict[str, Any]:
        """Keywords of ``Runtime.sample`` for images ``start`` to ``stop``, which the members ``names`` draw."""
        found = image_keywords(manifest, range(start, stop), self.prompts, names)
        return {**found, "seeds": list(range(self.seed + start, self.seed + stop))}


def image_keywords(
    manifest: Manifest, numbers: Sequence[int], prompts: Sequence[str], names: Iterable[str], *, pictures: int = 1
) -> dict[str, Any]:
    """Keywords of ``Runtime.sample`` without seeds. Image number ``i`` is of class or prompt ``i % count``.

    For members that inpaint there are ``pictures`` synthetic pictures (one, or one for each image), whose left half is
    painted anew.
    """
    if manifest.conditioning.kind == "class":
        return {"labels": [i % manifest.conditioning.classes for i in numbers]}
    found: dict[str, Any] = {"prompt": [prompts[i % len(prompts)] for i in numbers]}
    if any(manifest.members[name].inpaints for name in names):
        height, width = (s * manifest.decoder.factor for s in (manifest.latent.height, manifest.latent.width))
        found |= synthetic_painting(pictures, height, width)
    return found


def prompts_for(manifest: Manifest, given: Sequence[str], names: Iterable[str] | None = None) -> tuple[str, ...]:
    """The prompts of a study: those given, else ``PROMPTS`` for a text bundle and none for a class bundle.

    ``names``: the members that draw, by default all.

    Raises ``BadInput`` for prompts of a class bundle, ``Unavailable`` for a text bundle without its text encoders.
    """
    if manifest.conditioning.kind == "class":
        if given:
            raise BadInput(
                f"{len(given)} prompts were given, and the bundle {manifest.name!r} draws classes, not texts",
                hint="leave out --prompts: all classes are drawn in turn",
            )
        return ()
    if not reads_prompts(manifest, manifest.members if names is None else names):
        raise Unavailable(
            f"the bundle {manifest.name!r} has no text encoder for each of its members, so it can't read prompts",
            hint="build it from a whole pipeline folder",
        )
    return tuple(given) or PROMPTS
