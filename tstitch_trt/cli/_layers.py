"""The compiled layers of an engine as text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from tstitch_trt.cli._text import print_entries, print_table

if TYPE_CHECKING:
    from tstitch_engines.backends.tensorrt.layers import LayerTensor
    from tstitch_trt.verify.plan_layers import CompiledLayer, LayerList

__all__ = ["print_layers"]

_SHOWN: Final = 500  # letters of a name; --json has all


def print_layers(title: str, found: LayerList | str) -> None:
    """A summary, what is suspicious, and one line for each layer; or why there are none."""
    if isinstance(found, str):
        print_entries(title, [("no layers", found)])
        return
    summary = found.summary
    between = [
        f"{count:.1f} {what}"
        for count, what in ((summary.passes, "kernels beside products"), (summary.copies, "of them copies"))
        if count is not None
    ]
    entries = [
        ("layers", f"{summary.count} by the {found.source} of {_printable(found.library)}: {_counts(summary.kinds)}"),
        ("products", _counts(summary.products)),
        ("attention", _counts(summary.attention, "fused in ")),
        ("between", f"from one attention to the next {', '.join(between)}" if between else ""),
        ("streams", str(summary.streams) if summary.streams > 1 else ""),
        *(("suspicious", text) for text in found.suspicious),
    ]
    print_entries(title, entries)
    print_table(
        ("layer", "kind", "precision", "name", "type", "kernel", "reads", "weights", "writes"),
        [
            (
                str(index), layer.kind, *map(_printable, (layer.precision, layer.name, layer.type, _kernel(layer))),
                _tensors(layer.inputs), _tensors(layer.constants[:1]), _tensors(layer.outputs),
            )
            for index, layer in enumerate(found.layers)
        ],
    )  # fmt: skip


def _kernel(layer: CompiledLayer) -> str:
    """Without its digest; ``-`` for one that is named as its layer, and for one that is chosen on loading."""
    name = re.sub(r"_0x[0-9a-f]{16,}$", "", layer.kernel)
    return "-" if not name or name == "__myelin_CASK_STUB" or layer.name.startswith(name) else name


def _printable(text: str) -> str:
    """The list may be a stranger's file: nothing in it reaches the terminal as a command."""
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
    return "".join(character if character.isprintable() else "?" for character in shown)


def _counts(found: Mapping[str, int], word: str = "") -> str:
    return ", ".join(f"{count} {word}{_printable(name)}" for name, count in found.items())


def _tensors(tensors: Iterable[LayerTensor]) -> str:
    """``fp16[-1,64]``, each once and how often."""
    shown = Counter(f"{_printable(one.dtype)}[{','.join(map(str, one.shape))}]" for one in tensors)
    return " ".join(f"{count}x{one}" if count > 1 else one for one, count in shown.items()) or "-"
