"""``--lora NAME=FILE[:WEIGHT]``, which may be repeated: of ``build``, and of ``sample`` for engines that can refit."""

from __future__ import annotations

from tstitch_engines.errors import BadInput

__all__ = ["lora_texts"]


def lora_texts(given: tuple[str, ...]) -> dict[str, str]:
    """``FILE[:WEIGHT],...`` by name, a list of them where a name comes more than once."""
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not (equals and name and file):
            raise BadInput(f"--lora {text!r} is not NAME=FILE[:WEIGHT]", hint="e.g. --lora large=style.safetensors:0.8")
        found.setdefault(name, []).append(file)
    return {name: ",".join(files) for name, files in found.items()}
