"""``report.md``: the goals with what was measured next to them, and a table per part, from the JSON files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gpubench.cases import dit_cases
from gpubench.record import Entry, read_part
from tstitch_trt.files import write_text

__all__ = ["report"]

Parts = dict[str, Entry]

# Dense float16 and bfloat16 of the data sheets, by the name that the driver gives. No GPU reaches them on real data.
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4}


def report(out: Path, names: Iterable[str], *, smoke: bool) -> Path:
    parts = {name: found for name in names if (found := read_part(out / f"{name}.json")) is not None}
    lines = ["# Measured on a GPU" if not smoke else "# Smoke run: tiny models, nothing here is a measurement", ""]
    measured_parts = {name: part for name, part in parts.items() if part["machine"]["gpus"] and not part["smoke"]}
    lines += [*_machines(parts), "", "## Goals", "", "| goal | measured | met |", "|---|---|---|"]
    lines += [f"| {goal} | {measured} | {met} |" for goal, measured, met in _goals(measured_parts)]
    lines += ["", "## Parts", "", "| part | state | took |", "|---|---|---|"]
    lines += [f"| {name} | {_state(part)} | {_seconds(part)} |" for name, part in parts.items()]
    for case in dit_cases(smoke=smoke):
        if case.name in parts:
            lines += ["", *_case(case.name, parts[case.name])]
    for title, rows in (
        ("TensorRT-RTX", _rtx(parts)),
        ("Whole segments in one launch", _segments(parts)),
        ("Step kernels alone", _kernels(parts)),
        ("Soak", _soak(parts)),
    ):
        if rows:
            lines += ["", f"## {title}", "", *rows]
    path = out / "report.md"
    write_text(path, "\n".join(lines) + "\n")
    return path


def _machines(parts: Parts) -> list[str]:
    """Each machine that a part was run on, and the command."""
    seen = {}
    for part in parts.values():
        machine = part["machine"]
        gpus = ", ".join(machine["gpus"]) or "no GPU"
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        seen[f"- {gpus}; {machine['processor']}, {machine['cores']} cores; Python {machine['python']}, {versions}"] = 1
    commands = dict.fromkeys(f"- `{part['command']}`" for part in parts.values())
    return [*seen, "", "Commands:", "", *commands]


def _state(part: Entry) -> str:
    bad = [f"{name}: {e.get('reason', '').splitlines()[0]}" for name, e in part["entries"].items() if _said(e)]
    text = str(part.get("reason") or part["status"])
    return (text + ("; " + "; ".join(bad) if bad else "")).replace("|", "\\|").replace("\n", " ")


def _said(entry: Entry) -> bool:
    return entry["status"] in ("failed", "not run") and bool(entry.get("reason"))


def _seconds(part: Entry) -> str:
    return f"{sum(entry.get('seconds', 0.0) for entry in part['entries'].values()):.0f} s"


# --- goals


def _ok(part: Entry | None) -> dict[str, Entry]:
    return {} if part is None else {name: e for name, e in part["entries"].items() if e["status"] == "ok"}


def _ours(parts: Parts) -> Iterable[tuple[str, str, Entry]]:
    for part_name, part in parts.items():
        for name, entry in _ok(part).items():
            if name.startswith("ours:"):
                yield part_name, name, entry


def _wall(entry: Entry | None, fraction: float) -> float | None:
    rows = () if entry is None else entry.get("trajectories", ())
    return next((row["wall_ms"]["median"] for row in rows if row["fraction"] == fraction), None)


def _goals(parts: Parts) -> list[tuple[str, str, str]]:
    found = [
        _worst("runtime overhead at most 1.01", parts, lambda row: row["overhead"]["median"], lambda v: v <= 1.01),
        _worst(
            "trajectory within 2 % of the prediction at any fraction",
            parts,
            lambda row: abs(row["measured_over_predicted"] - 1),
            lambda v: v <= 0.02,
        ),
    ]
    for precision in ("fp16", "bf16"):
        found += [_share_of_ceiling(parts, f"dit-s-xl-256-b8-{precision}", precision, f) for f in (0.0, 0.4)]
        one = parts.get(f"dit-s-xl-256-b1-{precision}")
        for other, factor in (("torch-eager", 3.0), ("torch-compile", 1.2)):
            text = f"DiT-XL/2 batch 1 {precision}: at least {factor:g}x {other}"
            found.append(_speedup(one, other, factor, text))
    traces = [(f"{p} {n}", e["host"]["trace"]["clean"]) for p, n, e in _ours(parts) if "trace" in e.get("host", {})]
    goal = "no wait, copy or allocation between the first and the last step"
    if traces:
        dirty = [name for name, clean in traces if not clean]
        found.append((goal, f"{len(traces) - len(dirty)} of {len(traces)} traces clean", _met(not dirty)))
    else:
        found.append((goal, "not measured", ""))
    soaks = {name: e["growth_bytes"] for name, e in _ok(parts.get("soak")).items()}
    text = ", ".join(f"{name}: {growth:,} bytes" for name, growth in soaks.items())
    goal = "no growth of device memory over 1,000 trajectories"
    found.append((goal, text or "not measured", _met(all(v <= 0 for v in soaks.values())) if soaks else ""))
    return found


def _met(met: bool) -> str:
    return "yes" if met else "**no**"


def _worst(
    goal: str, parts: Parts, value: Callable[[Entry], float], met: Callable[[float], bool]
) -> tuple[str, str, str]:
    values = [
        (value(row), f"{part} {name} at {row['fraction']:g}")
        for part, name, entry in _ours(parts)
        for row in entry["trajectories"]
    ]
    if not values:
        return goal, "not measured", ""
    worst, where = max(values)
    good = sum(met(v) for v, _ in values)
    return goal, f"worst {worst:.4f} ({where}); {good} of {len(values)} within", _met(met(worst))


def _share_of_ceiling(parts: Parts, name: str, precision: str, fraction: float) -> tuple[str, str, str]:
    stitched = f", {fraction:.0%} of them on S/2" if fraction else ""
    goal = f"DiT-XL/2 batch 8 {precision}, 100 steps{stitched}: at least 60 % of the measured matrix ceiling"
    entries = _ok(parts.get(name))
    ceiling = entries.get("ceilings")
    rates = [
        (row["tflops"], row["wall_ms"]["median"], contender)
        for contender, entry in entries.items()
        if contender.startswith("ours:")
        for row in entry["trajectories"]
        if row["fraction"] == fraction
    ]
    if not rates or ceiling is None:
        return goal, "not measured", ""
    rate, ms, who = max(rates)
    top = ceiling["matmul"]["tflops"]["median"]
    peaks = {PEAK_TFLOPS.get(gpu.partition(",")[0]) for gpu in parts[name]["machine"]["gpus"]} - {None}
    peak = f"; {rate / peaks.pop():.1%} of the vendor's peak" if len(peaks) == 1 else ""
    said = f"{rate:.0f} of {top:.0f} TFLOP/s of a large product in the same part, {ms:.0f} ms, {who}{peak}"
    return goal, f"{rate / top:.1%} ({said})", _met(rate / top >= 0.6)


def _speedup(part: Entry | None, other: str, goal: float, text: str) -> tuple[str, str, str]:
    entries = _ok(part)
    theirs = _wall(entries.get(other), 0.0)
    mine = [(ms, name) for name, e in entries.items() if name.startswith("ours:") and (ms := _wall(e, 0.0)) is not None]
    if theirs is None or not mine:
        return text, "not measured", ""
    ms, who = min(mine)
    return text, f"{theirs / ms:.2f}x ({who}: {ms:.1f} ms, {other}: {theirs:.1f} ms)", _met(theirs / ms >= goal)


# --- tables


def _case(name: str, part: Entry) -> list[str]:
    entries = _ok(part)
    ceiling = entries.get("ceilings", {}).get("matmul", {}).get("tflops", {}).get("median")
    lines = [f"## {name}", "", f"{part['case']['steps']} DDIM steps, guidance on; wall time of one batch, ms "
             f"(median, p10 to p90); matrix ceiling {ceiling:.1f} TFLOP/s." if ceiling else "", ""]  # fmt: skip
    lines += ["| contender | fraction | ms | TFLOP/s | overhead | error | host µs per step | idle between launches |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for contender, entry in entries.items():
        for row in entry.get("trajectories", ()):
            wall = row["wall_ms"]
            host = row.get("host_us_per_step") or entry.get("host", {}).get("host_us_per_step")
            gaps = (entry.get("trace") or entry.get("host", {}).get("trace") or {}).get("gaps")
            lines.append(
                f"| {contender} | {row['fraction']:g} | {wall['median']:.2f} ({wall['p10']:.2f} to {wall['p90']:.2f}) "
                f"| {row['tflops']:.3g} | {_number(row.get('overhead'), '.4f')} "
                f"| {_error(entry['errors'].get(str(row['fraction'])))} | {_number(host, '.1f')} "
                f"| {'' if gaps is None else format(gaps['idle_share'], '.1%')} |"
            )
    rows = [
        f"| {contender} | {member} | {m['median']:.4f} | {m['tflops']:.3g} | {m['gb_per_s']:.4g} "
        f"| {entry['step_kernels']['pair_ms']['median'] / m['median']:.2%} | {_bytes(entry)} |"
        for contender, entry in entries.items()
        for member, m in entry.get("members", {}).items()
    ]
    if rows:
        lines += ["", "| engine | member | bare ms | TFLOP/s | GB/s (least) | step kernels' share | memory |"]
        lines += ["|---|---|---|---|---|---|---|", *rows]
    return lines


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value["median"], form)


def _error(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.1e}"


def _bytes(entry: Entry) -> str:
    parts = {**entry.get("memory", {})}
    if "device_memory_bytes" in entry:
        parts["loaded"] = entry["device_memory_bytes"]
    if "memory_private_scratch" in entry:
        parts["activations if private"] = entry["memory_private_scratch"]["activations"]
    return ", ".join(f"{name} {value / 2**20:.1f} MiB" for name, value in parts.items())


def _rtx(parts: Parts) -> list[str]:
    rows = []
    for name, entry in parts.get("rtx", {"entries": {}})["entries"].items():
        if entry["status"] != "ok":
            rows.append(f"- {name}: {entry['status']}: {entry.get('reason', '')}".replace("\n", " "))
            continue
        last = next((s for s in reversed(entry["steps"]) if s.get("problem")), None)
        said = "runs and is right" if entry["runs"] else f"exit code {entry['exit_code']}"
        if last is not None:
            errors = [m for m in last["messages"] if m.startswith(("ERROR", "INTERNAL_ERROR"))]
            said = f"{last['step']}: {last['problem']}" + "".join(f"; {m}" for m in errors[:3])
        rows.append(f"- {name}: {said}")
    return rows


def _segments(parts: Parts) -> list[str]:
    return [
        f"- {name}, fraction {row['fraction']:g}: {row['segment_ms']['median']:.2f} ms, with a launch per step "
        f"{row['step_ms']['median']:.2f} ms ({row['step_over_segment']['median']:.3f}x)"
        for name, entry in _ok(parts.get("segments")).items()
        for row in entry["trajectories"]
    ]


def _kernels(parts: Parts) -> list[str]:
    entries = _ok(parts.get("kernels"))
    copy = entries.pop("copy", None)
    if copy is None or not entries:
        return []
    top = copy["gb_per_s"]["median"]
    lines = [f"Copy ceiling {top:.0f} GB/s.", "", "| | µs per pair | GB/s | of the ceiling |", "|---|---|---|---|"]
    for name, entry in entries.items():
        rate = entry["gb_per_s"]["median"]
        share = "from the L2 cache" if entry["in_l2"] else f"{rate / top:.1%}"
        lines.append(f"| {name} | {entry['pair_us']['median']:.2f} | {rate:.0f} | {share} |")
    return lines


def _soak(parts: Parts) -> list[str]:
    return [
        f"- {name}: {e['trajectories']} trajectories, {e['growth_bytes']:,} bytes more than after {e['warm']} "
        f"({e['measured']}), {e['allocations_after_warm_up']} allocations of our own after that"
        for name, e in _ok(parts.get("soak")).items()
    ]
