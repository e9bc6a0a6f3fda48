"""``sample --ray`` on a local cluster: the same bytes whoever draws, and whatever ended the run in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tstitch_trt
from support.rays import RAY_WARNINGS
from tstitch_trt.cli import main
from tstitch_trt.serve.bulk import JOURNAL

pytestmark = RAY_WARNINGS

N, SHARD = 96, 4
WORDS = ["--labels", "0-9", "-n", str(N), "--steps", "4", "--seed", "7", "--ray", "--shard", str(SHARD)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != JOURNAL}


def drawn(folder: Path) -> int:
    """Finished shards."""
    journal = folder / JOURNAL
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


@pytest.fixture(scope="module")
def by_one(address: str, fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("ray") / "one"
    assert main(["sample", str(fashion_bundle), *WORDS, "--workers", "1", "-o", str(output)]) == 0
    return output


def test_pictures_are_those_of_sample(by_one: Path, fashion_bundle: Path) -> None:
    assert len(files(by_one)) == N
    with tstitch_trt.load(fashion_bundle, threads=1) as runtime:
        alone = runtime.sample(labels="4-7", seeds=range(11, 15), steps=4).images
    assert alone is not None
    for index, picture in enumerate(alone, 4):
        np.testing.assert_array_equal(np.asarray(Image.open(by_one / f"{index:05d}.png")), picture[:, :, 0])


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_two_workers_that_were_ended_draw_the_same(
    number: signal.Signals, address: str, by_one: Path, fashion_bundle: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What was finished stays, and the bytes are those of one worker."""
    words = ["sample", str(fashion_bundle), *WORDS, "--workers", "2", "-o", str(tmp_path / "two")]
    with subprocess.Popen(
        [sys.executable, "-m", "tstitch_trt.cli", *words],
        env={**os.environ, "RAY_ADDRESS": address}, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        while drawn(tmp_path / "two") < 2 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number), said
    assert "Traceback" not in said
    before = drawn(tmp_path / "two")
    assert 0 < before < N // SHARD
    capfd.readouterr()
    assert main([*words, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["images"], told["before"]) == (N, before * SHARD)
    assert files(tmp_path / "two") == files(by_one)


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(by_one: Path, fashion_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "two"

    def kill() -> None:
        while drawn(output) < 2:
            time.sleep(0.005)
        workers = [
            path for path in Path("/proc").glob("[0-9]*/cmdline") if b"ray::MapWorker" in path.read_bytes()[:100]
        ]
        os.kill(int(workers[0].parent.name), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    words = ["sample", str(fashion_bundle), *WORDS, "--workers", "2", "-o", str(output)]
    assert main(words) == 0
    killer.join()
    assert files(output) == files(by_one)
