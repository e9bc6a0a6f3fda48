"""Shards of a bulk request without Ray: the journal keeps what is finished, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import tstitch_trt
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.errors import BadInput, Busy, OutOfMemory
from tstitch_trt import FailedImage
from tstitch_trt.cli import main
from tstitch_trt.cli._settings import describe
from tstitch_trt.files import atomic_file
from tstitch_trt.images.write import join_npz
from tstitch_trt.serve.bulk import JOURNAL, Bulk, DrawnShard, Run
from tstitch_trt.serve.ray_bulk import _Worker, read_row

SETTINGS = {"steps": "4", "images": "5"}


def shard(index: int, *names: str, failed: tuple[FailedImage, ...] = ()) -> DrawnShard:
    return DrawnShard(index, tuple((name, name.encode()) for name in names), failed)


def test_a_run_that_was_ended_goes_on(tmp_path: Path) -> None:
    lost = FailedImage(3, 3, 2, "large")
    with Run(tmp_path / "out", SETTINGS) as run:
        run.keep(shard(1, "00002.png", failed=(lost,)))
        run.keep(shard(0, "00000.png", "00001.png"))
    journal = tmp_path / "out" / JOURNAL
    whole = journal.read_bytes()
    for torn in range(1, 40):  # killed while it wrote its last line
        journal.write_bytes(whole[:-torn])
        with Run(tmp_path / "out", SETTINGS) as run:
            assert (run.finished, run.failed) == ({1}, (lost,))
    with Run(tmp_path / "out", SETTINGS) as run:
        run.keep(shard(0, "00000.png"))
        assert run.finished == {0, 1}
    (tmp_path / "out" / "00002.png").unlink()
    with Run(tmp_path / "out", SETTINGS) as run:
        assert run.finished == {0}, "whose files are gone is drawn again"


def test_what_a_killed_run_had_half_written_is_removed(tmp_path: Path) -> None:
    with Run(tmp_path / "out", SETTINGS) as run:
        run.keep(shard(0, "00000.png"))

    def write() -> None:
        with atomic_file(tmp_path / "out" / "00001.png"):
            assert len(list((tmp_path / "out").iterdir())) == 3
            with Run(tmp_path / "out", SETTINGS) as run:
                assert run.finished == {0}

    with pytest.raises(FileNotFoundError):  # it would have been put in its place at the end
        write()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.png", JOURNAL]


def test_a_folder_has_the_pictures_of_one_run(tmp_path: Path) -> None:
    with Run(tmp_path / "out", SETTINGS), pytest.raises(Busy, match="another run"):
        Run(tmp_path / "out", SETTINGS)
    with pytest.raises(BadInput, match="steps = 4, and this one has 5"):
        Run(tmp_path / "out", {**SETTINGS, "steps": "5"})
    for line in (b"x\n", b"{}\n", b'{"version":2,"settings":{}}\n', b"[" * 100 + b"\n", b"\xff\n"):
        (tmp_path / "out" / JOURNAL).write_bytes(line)
        with pytest.raises(BadInput, match="no journal"):
            Run(tmp_path / "out", SETTINGS)


def test_parts_joined_are_what_numpy_writes(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(0, 256, (7, 3, 2, 1), np.uint8)
    join_npz(tmp_path / "joined.npz", [whole[:3], whole[3:]], whole.shape)
    with np.load(tmp_path / "joined.npz") as found:
        assert list(found) == ["arr_0"]
        np.testing.assert_array_equal(found["arr_0"], whole)
    with pytest.raises(ValueError, match="6 rows"):
        join_npz(tmp_path / "short.npz", [whole[:6]], whole.shape)
    assert not (tmp_path / "short.npz").exists()


def test_shards_are_the_request_in_pieces(fashion_bundle: Path, tmp_path: Path) -> None:
    """Labels go round, and the last shard is shorter."""
    bulk = Bulk.of(
        open_bundle(fashion_bundle).manifest, {"labels": "3,5,7", "n": 11, "seed": 40, "steps": 2},
        open_runtime=partial(tstitch_trt.load, fashion_bundle, threads=1),
        describe=partial(describe, where={}, kept={}), shard=4, kind="npz", tile="auto", partial=False, loras={},
    )  # fmt: skip
    assert [bulk.size(index) for index in range(bulk.shards)] == [4, 4, 3]
    with bulk.load() as runtime, Run(tmp_path / "out.npz", bulk.settings()) as run:
        for index in (2, 0, 1):
            run.keep(bulk.draw(runtime, index))
        run.complete()
        alone = runtime.sample(labels=[3, 5, 7] * 3 + [3, 5], seeds=range(40, 51), steps=2).images
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_array_equal(found["arr_0"], alone)
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("-o out.png", "one grid"),
        ("--latents-out x.npy", "--latents-out"),
        ("--budget-ms 5", "--budget-ms"),
        ("--rebuild", "--rebuild"),
        ("--device cuda:1", "cuda:1"),
        ("--steps 0", "--steps"),
        ("--solver heun-9", "heun-9"),
        ("--seed 1 --seeds 1,2", "seed"),
    ],
)
def test_what_can_not_be_drawn_in_shards_is_refused(
    flags: str, said: str, fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(fashion_bundle), "--labels", "0-9", "--ray", *flags.split()]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--workers", "--shard"])
def test_how_ray_draws_is_refused_without_ray(
    flag: str, fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(fashion_bundle), "--labels", "0", "--steps", "1", flag, "64"]) == 2
    assert f"{flag} 64" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_does_not_answer_is_told_at_once(fashion_bundle: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        words = ["sample", str(fashion_bundle), "--labels", "0", "--ray", "--lora", "large=a.safetensors:0.8,b"]
        # A process of its own: this one may be a client of the cluster that other tests have.
        ended = subprocess.run(
            [sys.executable, "-m", "tstitch_trt.cli", *words, "-o", "out"],
            cwd=tmp_path, env={**os.environ, "RAY_ADDRESS": address}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert "no Ray cluster answers" in ended.stderr
    # Workers have a folder of their own.
    settings = json.loads((tmp_path / "out" / JOURNAL).read_text())["settings"]
    assert settings["loras"] == f"large: {tmp_path}/a.safetensors:0.8,{tmp_path}/b"


def test_what_a_worker_meets_comes_back_as_it_was(fashion_bundle: Path) -> None:
    small = partial(tstitch_trt.load, fashion_bundle, threads=1, max_memory="1KB")
    manifest = open_bundle(fashion_bundle).manifest
    bulk = Bulk.of(
        manifest, {"labels": "0", "steps": 2}, open_runtime=small, describe=partial(describe, where={}, kept={}),
        shard=4, kind="npz", tile="auto", partial=False, loras={},
    )  # fmt: skip
    with pytest.raises(OutOfMemory, match=r"1 KB|1000 B|needs") as met:
        read_row(_Worker(bulk)({"shard": [0]})["drawn"][0])
    assert "--max-memory" in met.value.hint
    other = dataclasses.replace(bulk, bundle="0" * 64, open_runtime=partial(tstitch_trt.load, fashion_bundle))
    with pytest.raises(BadInput, match="digest"):
        read_row(_Worker(other)({"shard": [0]})["drawn"][0])
