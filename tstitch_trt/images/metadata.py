"""The settings of a picture in the form that picture browsers know: the prompt, then ``Name: value``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["parameters_text"]


def parameters_text(settings: Mapping[str, Any], *, size: tuple[int, int]) -> str | None:
    """The PNG text ``parameters`` of settings as ``outputs.write_images`` gets them; ``None`` without a prompt.

    The prompt, a line ``Negative prompt:`` where there is one, and a line of settings separated by commas; a value with
    a comma or colon in it is quoted. Several images have one prompt a line. ``size``: width and height in pixels.
    """
    images = settings.get("images") or [settings]
    prompts = _distinct(images, settings, "prompt")
    if not prompts:
        return None
    seeds = [str(image["seed"]) for image in images if "seed" in image]
    schedule = settings.get("schedule") or {}
    values = {
        "Steps": settings.get("steps"),
        "Sampler": settings.get("solver"),
        "Schedule": schedule.get("text") if isinstance(schedule, Mapping) else schedule,
        "CFG scale": _guidance(settings.get("guidance")),
        "Seed": ", ".join(seeds),
        "Size": f"{size[0]}x{size[1]}",
        "Denoising strength": settings.get("strength"),
        "Model": settings.get("bundle"),
        "Version": "tstitch-trt",
    }
    lines = list(prompts)
    if negatives := _distinct(images, settings, "negative"):
        lines.append(f"Negative prompt: {' | '.join(negatives)}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value not in (None, "")))
    return "\n".join(lines)


def _distinct(images: Any, settings: Mapping[str, Any], key: str) -> list[str]:
    found: dict[str, None] = {}
    for given in (*(image.get(key) for image in images), settings.get(key)):
        texts = [given] if isinstance(given, str) else given or ()
        found.update(dict.fromkeys(str(text) for text in texts if text))
    return list(found)


def _guidance(scales: object) -> str | None:
    """One number where there is one; else each member's, ``small 7.5, large 5``."""
    if not isinstance(scales, Mapping):
        return None if scales is None else f"{scales:g}"
    by_member = {member: "/".join(f"{scale:g}" for scale in own) for member, own in scales.items()}
    if len(set(by_member.values())) == 1:
        return next(iter(by_member.values()))
    return ", ".join(f"{member} {scale}" for member, scale in by_member.items()) or None


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ',:"\n') else text
