"""What ``benchmarks/peers.py`` found, as tables and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tstitch_trt.plots.figure import figure

__all__ = ["markdown", "plot"]


def markdown(document: dict[str, Any]) -> str:
    machine, ours = document["machine"], document["compared_with"]
    loads = document["loads"]
    lines = [
        f"`{document['command']}`",
        "",
        f"{document['bundle']}: batch {document['batch']}, {document['steps']} {document['solver']} steps, guidance "
        f"{document['guidance']:g}, seeds from {document['seed']}; {document['device']}, {machine['processor']}, "
        f"{machine['cores']} cores, CPU threads of each: {document['threads']}, load {min(loads):g} to {max(loads):g} "
        f"(its own threads included). Milliseconds per batch without decoding: median of {document['repeats']} rounds, "
        f'p10 to p90. "{ours} is faster by": median over the rounds of the contender\'s time over its. '
        f"Latents: relative L2 difference from those of {ours}, checked before anything was timed "
        f"(allowed {document['tolerance']:.0e}).",
        "",
        f"| contender | first member's share | ms | p10 to p90 | {ours} is faster by | latents differ by |",
        "|---|---|---|---|---|---|",
    ]
    for contender in document["contenders"]:
        reference = contender["name"] == ours
        lines += [
            f"| {contender['name']} | {t['fraction']:.0%} | {t['ms']:.1f} | {t['p10_ms']:.1f} to {t['p90_ms']:.1f} | "
            + ("" if reference else f"{t['speedup_of_ours']:.2f}")
            + " | "
            + ("" if reference else f"{t['relative_difference']:.1e}")
            + " |"
            for t in contender["trajectories"]
        ]
    lines += [
        "",
        "Not in these times, in seconds:",
        "",
        "| contender | what runs | build | load | first walk at each fraction, compiling included |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {c['name']} | {c['what']} | {c.get('build_s', 0):.1f} | {c['load_s']:.1f} | {c['first_walks_s']:.1f} |"
        for c in document["contenders"]
    ]
    return "\n".join(lines) + "\n"


def plot(path: Path, document: dict[str, Any]) -> None:
    """Time by fraction and contender, and how much faster ours is than each."""
    contenders, ours = document["contenders"], document["compared_with"]
    shares = [f"{t['fraction']:.0%}" for t in contenders[0]["trajectories"]]
    with figure(path, columns=2, size=(13, 4.6)) as axes:
        for axis, key, low, high, label in (
            (axes[0], "ms", "p10_ms", "p90_ms", f"ms per batch of {document['batch']} images"),
            (axes[1], "speedup_of_ours", "p10_speedup", "p90_speedup", f"time over that of {ours}"),
        ):
            shown = [c for c in contenders if key == "ms" or c["name"] != ours]
            width = 0.8 / max(len(shown), 1)
            for index, contender in enumerate(contenders):
                if contender not in shown:
                    continue
                rows = contender["trajectories"]
                middle = [t[key] for t in rows]
                errors = [[t[key] - t[low] for t in rows], [t[high] - t[key] for t in rows]]
                at = [i + width * (shown.index(contender) - (len(shown) - 1) / 2) for i in range(len(rows))]
                axis.bar(at, middle, width, yerr=errors, capsize=2, color=f"C{index}", label=contender["name"])
            axis.set_xticks(range(len(shares)), shares)
            axis.set_xlabel("first member's share of the steps")
            axis.set_ylabel(label)
            axis.grid(axis="y", alpha=0.3)
        axes[1].axhline(1, color="black", linewidth=0.8)
        axes[0].legend()
        axes[0].set_title(
            f"{document['bundle']}: {document['steps']} {document['solver']} steps, guidance "
            f"{document['guidance']:g}, CPU threads: {document['threads']}"
        )
        axes[1].set_title(f"above 1: {ours} is faster (medians, p10 to p90)")
