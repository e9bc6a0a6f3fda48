"""Parts that are other programs: the tests on the GPU, the sanitizer over the step kernels, training and quality."""

from __future__ import annotations

import gzip
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gpubench.cases import CONTENDERS
from gpubench.record import Context, Entry, NotRun, Part
from tstitch_engines.errors import FailedWork

__all__ = ["KERNEL_TESTS", "ROOT", "groups", "pytest_work", "sanitizer_part", "tests_part", "train_part"]

ROOT = Path(__file__).resolve().parents[2]
KERNEL_TESTS = "tests/tstitch_engines/device/test_cuda.py"
_BACKENDS = tuple(name.removeprefix("ours:") for name in CONTENDERS if name.startswith("ours:"))


def tests_part(context: Context, part: Part) -> None:
    """Every test marked ``gpu``, a file and backend at a time. Without a GPU they are collected and skip themselves."""
    paths = [KERNEL_TESTS] if context.smoke else [str(p) for p in _marked()]
    for name, tests in groups(paths).items():
        part.attempt(name, pytest_work(context, tests), reserve=0 if context.smoke else 150)
    if not context.cuda:
        raise NotRun("no CUDA device (the tests skipped themselves)")


def _marked() -> list[Path]:
    """The files with such tests; others may need packages that are not there to be collected."""
    return [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]


def pytest_work(context: Context, tests: list[str]) -> Callable[[Entry], Entry]:
    return lambda entry: _pytest(context, entry, [], tests)


def groups(paths: list[str], only: str = "") -> dict[str, list[str]]:
    """The tests by their file and the backend that their parameters begin with. Raises ``FailedWork``.

    ``only``: as pytest's ``-k``.
    """
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
    command += ["--collect-only", "-q", "-k", only, *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if "::" in line and not done.returncode:
            parameters = line.partition("[")[2]
            backend = max((name for name in _BACKENDS if parameters.startswith(name)), key=len, default="")
            found.setdefault(f"{Path(line.partition('::')[0]).stem} {backend}".strip(), []).append(line)
    if not found:
        raise FailedWork(f"pytest collects no tests: {done.stdout[-1000:]}{done.stderr[-1000:]}", hint="run it by hand")
    return found


def sanitizer_part(context: Context, part: Part) -> None:
    context.need_cuda()
    tool = shutil.which("compute-sanitizer") or next(
        (str(p) for p in sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None
    )
    if tool is None:
        raise NotRun("compute-sanitizer is not on the PATH nor under /usr/local/cuda*/bin")
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "99", "--target-processes", "all"]

        def work(entry: Entry, command: list[str] = command) -> Entry:
            return _pytest(context, entry, command, [KERNEL_TESTS])

        part.attempt(check, work, reserve=120)


def _pytest(context: Context, entry: Entry, before: list[str], paths: list[str]) -> Entry:
    """Runs pytest on the tests marked gpu; raises ``FailedWork`` when one failed or the program before it objects."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "junit.xml"
        # -W default: the packages there may be newer than those that the tests know, and warn.
        command = [*before, sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
        command.append(f"--junitxml={xml}")
        done = _run(context, [*command, *paths], entry)
        entry["output"] = done.stdout[-6000:]
        entry["summary"] = re.sub(r"^=+ | =+$", "", next(iter(reversed(done.stdout.strip().splitlines())), ""))
        if xml.is_file():
            suite = ElementTree.parse(xml).getroot().find("testsuite")  # noqa: S314 - pytest wrote it just now
            if suite is not None:
                entry["counts"] = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
        if before:
            entry["sanitizer"] = [line for line in done.stdout.splitlines() if line.startswith("========= ")][-20:]
    if done.returncode:
        raise FailedWork(f"exit code {done.returncode}: {entry['summary']}", hint="the output is in the record")
    return {}


def train_part(context: Context, part: Part) -> None:
    """Trains both members of the built-in pair and measures the quality of the stitched pair.

    Training takes ``train_minutes`` for the large member and a third of that for the small one, over as many runs as
    it needs: it goes on from its own checkpoints.
    """
    if not context.smoke:
        context.need_cuda()
    data = _made_up_images(context.scratch / "made-up") if context.smoke else context.data
    if data is None:
        raise NotRun("no --data DIR with the four idx.gz files of Fashion-MNIST was given")
    runs = context.scratch / "train"
    for member, share in (("large", 1.0), ("small", 1 / 3)):
        length = (
            ["--images", "96", "--batch", "32"]
            if context.smoke
            else ["--minutes", f"{context.train_minutes * share:g}", "--batch", "512"]
        )
        command = [sys.executable, "-m", "tstitch_export.train.fashion", "--data", str(data), "--member", member]
        command += ["--out", str(runs / member), "--device", context.device.partition(":")[0], *length]

        def train(entry: Entry, command: list[str] = command) -> Entry:
            done = _run(context, command, entry, stop_early=True)
            if done.returncode:
                raise FailedWork(f"exit code {done.returncode}: {done.stdout[-2000:]}", hint="see the record")
            return {"log": (Path(command[command.index("--out") + 1]) / "log.json").read_text()[-4000:]}

        if part.attempt(f"train {member}", train) is None:
            entry = part.entries[f"train {member}"]
            if entry.get("interrupted"):  # not a failure: it goes on next time
                entry |= {"status": "put off", "tries": 0}
                part.pending = True
            return
    bundle = context.scratch / "trained.bundle"

    def quality(entry: Entry) -> Entry:
        from tstitch_export.build import build

        build("fashion", members={m: runs / m / "ema.safetensors" for m in ("large", "small")}, output=bundle,
              device=context.device, options={"small.num_heads": 2, "large.num_heads": 3})  # fmt: skip
        out = context.out / "quality"
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tstitch_trt.cli", "evaluate", str(bundle), "--device", context.device]
        command += ["--guidance", "1", "--plot", str(out / "quality.png"), "--work", str(context.scratch / "quality")]
        command += ["--samples", "8", "--steps", "2", "--time", "1"] if context.smoke else []
        done = _run(context, command, entry)
        if done.returncode:
            raise FailedWork(f"exit code {done.returncode}: {done.stdout[-2000:]}", hint="see the record")
        for record in (bundle / "studies").glob("evaluation-*.json"):
            shutil.copy(record, out)
        return {"table": done.stdout[-8000:]}

    part.attempt("quality", quality, reserve=120)


def _run(
    context: Context, command: list[str], entry: Entry, *, stop_early: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs it for what is left of the time. ``stop_early``: it saves its state on SIGINT, so send one in good time."""
    entry["command"] = command
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=max(context.seconds_left() - (20 if stop_early else 5), 1))
    except subprocess.TimeoutExpired:
        entry["interrupted"] = True
        process.send_signal(signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        if not stop_early:
            raise FailedWork(
                f"stopped at the end of the part's time: {output[-1000:]}", hint="raise --budget-minutes"
            ) from None
    except BaseException:
        process.kill()
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, None)


def _made_up_images(folder: Path) -> Path:
    """Random pictures in the files that the trainer reads: for ``--smoke``, which proves the way and no quality."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for split, count in (("train", 64), ("t10k", 32)):
        for kind, magic, shape, top in (
            ("images-idx3", 2051, (count, 28, 28), 256),
            ("labels-idx1", 2049, (count,), 10),
        ):
            values = generator.integers(0, top, shape, np.uint8)
            head = struct.pack(f">{1 + len(shape)}I", magic, *shape)
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    return folder
