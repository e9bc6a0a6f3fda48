"""What ``benchmarks/serving.py`` found, as tables and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tstitch_trt.plots.figure import figure, series

__all__ = ["markdown", "plot"]


def markdown(document: dict[str, Any]) -> str:
    machine = document["machine"]
    lines = [
        f"`{document['command']}`",
        "",
        f"{document['bundle']}: {document['arrivals']} arrivals for {document['seconds']:g} s in each window, seed "
        f"{document['seed']}; {document['device']}, {machine['processor']}, {machine['cores']} cores, engine threads: "
        f"{document['threads']}. Pictures of all were compared with those of {document['compared_with']} first, and "
        f"again under every load: no pixel differs by more than {document['tolerance']} of 255 levels.",
        "",
    ]
    lines += [f"- {each['name']}: {each['what']}" for each in document["contenders"]]
    for mix in document["mixes"]:
        limits = list(mix["sustained"])
        lines += [
            "",
            f"## {mix['name']}",
            "",
            f"One request at a time: {mix['capacity']:.1f} requests a second (load 1).",
            "",
            f"Requests a second at which {document['attained']:.0%} are answered within the limit:",
            "",
            "| contender | " + " | ".join(limits) + " |",
            "|---|" + "---|" * len(limits),
        ]
        for each in document["contenders"]:
            cells = [mix["sustained"][limit].get(each["name"], {"text": ""})["text"] for limit in limits]
            lines.append(f"| {each['name']} | " + " | ".join(cells) + " |")
        for name, gain in mix["gain"].items():
            lines.append(f"| engine over {name} | " + " | ".join(gain[limit] for limit in limits) + " |")
        first = limits[0]
        lines += [
            "",
            f"| load | contender | images/s | p50 ms | p95 ms | p99 ms | goodput ({first}) | lanes a call | CPU s "
            "| peak MiB |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for load in mix["loads"]:
            for name, found in load["contenders"].items():
                times = " | ".join(_number(found[f"p{share}_ms"], "") for share in (50, 95, 99))
                lines.append(
                    f"| {load['load']:g} | {name} | {found['images_per_second']:.1f} | {times} | "
                    f"{found['goodput'][first]:.1f} of {load['rate']:.1f} | {_number(found['lanes_per_call'], '', 2)} "
                    f"| {found['cpu_seconds']:.1f} | {found['peak_bytes'] / 2**20:.0f} |"
                )
        shares = [
            f"{found['overhead_ms']:.2f} of {found['large_step_ms']:.1f} ms ({found['overhead_share']:.1%}) at load "
            f"{load['load']:g}"
            for load in mix["loads"]
            for name, found in load["contenders"].items()
            if name == "engine" and "overhead_share" in found
        ]
        if shares:
            lines += ["", f"Beside a step, as a share of a step of the large member: {', '.join(shares)}."]
    return "\n".join(lines) + "\n"


def _number(value: float | None, missing: str, digits: int = 0) -> str:
    return missing if value is None else f"{value:.{digits}f}"


def plot(path: Path, document: dict[str, Any]) -> None:
    """Goodput and p95 over the offered load, a row for each mix."""
    mixes = document["mixes"]
    names = [each["name"] for each in document["contenders"]]
    with figure(path, rows=len(mixes), columns=2, size=(13, 4.4 * len(mixes))) as grid:
        for mix, (goodput, p95) in zip(mixes, grid.reshape(len(mixes), 2), strict=True):
            limit = next(iter(mix["sustained"]))
            rates = [load["rate"] for load in mix["loads"]]
            goodput.plot(rates, rates, color="black", linewidth=0.8, linestyle=":", label="offered")
            for index, name in enumerate(names):
                points = [
                    (load["rate"], load["contenders"][name]) for load in mix["loads"] if name in load["contenders"]
                ]
                x = [rate for rate, _ in points]
                goodput.plot(x, [found["goodput"][limit] for _, found in points], label=name, **series(index))
                shown = [(rate, found["p95_ms"]) for rate, found in points if found["p95_ms"] is not None]
                p95.plot([rate for rate, _ in shown], [ms for _, ms in shown], label=name, **series(index))
            goodput.set_title(f"{mix['name']}: goodput, limit {limit}")
            goodput.set_ylabel("requests a second within the limit")
            p95.set_title(f"{mix['name']}: 95th percentile of latency")
            p95.set_ylabel("ms")
            p95.set_yscale("log")
            for set_formatter in (p95.yaxis.set_major_formatter, p95.yaxis.set_minor_formatter):
                set_formatter("{x:g}")
            for axes in (goodput, p95):
                axes.set_xlabel("offered requests a second")
            goodput.legend()
