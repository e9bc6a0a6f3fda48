"""``export-triton``, run by the real tritonserver that the wheel of nvidia-pytriton carries."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.bindings import unpacked
from support.command import Command
from tstitch_trt.cli import main
from tstitch_trt.serve.triton import MODEL

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
NUMPY = "numpy==1.26.4"  # this tritonserver (24.10) was built before NumPy 2
SECONDS = 60


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def python_of_the_backend(folder: Path, wheels: Path) -> Path:
    """An environment with what this process imports, but with a NumPy that Triton knows."""
    venv.create(folder, symlinks=True)
    packages = folder / "lib" / f"python{PYTHON}" / "site-packages"
    shutil.copytree(unpacked(NUMPY, wheels), packages, dirs_exist_ok=True)
    (packages / "all.pth").write_text("\n".join(path for path in sys.path if path and Path(path).is_dir()))
    return folder / "bin"


@pytest.fixture(scope="module")
def servers(wheels: Path, fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The addresses over HTTP and gRPC of a tritonserver with one model, ``shoes``, of four lanes."""
    if sys.version_info >= (3, 13):
        pytest.skip(f"{NUMPY} has no wheel for Python {PYTHON}")
    library = Path(sysconfig.get_config_var("LIBDIR"))
    try:
        ctypes.CDLL(f"libpython{PYTHON}.so.1.0")
    except OSError:
        if not (library / f"libpython{PYTHON}.so.1.0").exists():
            pytest.skip(f"Triton's backend needs libpython{PYTHON}.so, which this Python was built without")
    folder = tmp_path_factory.mktemp("triton")
    wheel = unpacked("nvidia-pytriton==0.7.0", wheels)
    triton = wheel / "pytriton" / "tritonserver"
    backend = folder / "backends" / "python"
    shutil.copytree(triton / "backends" / "python", backend)
    shutil.copy(triton / "python_backend_stubs" / PYTHON / "triton_python_backend_stub", backend)
    for program in (backend / "triton_python_backend_stub", triton / "bin" / "tritonserver"):
        program.chmod(0o755)
    assert main(["export-triton", str(fashion_bundle), "-o", str(folder / "models"), "--name", "shoes",
                 "--threads", "1", "--max-queue", "40", "--max-lanes", "4"]) == 0  # fmt: skip
    port, grpc, log = free_port(), free_port(), folder / "log"
    paths = {"PATH": f"{python_of_the_backend(folder / 'python', wheels)}{os.pathsep}{os.environ['PATH']}",
             "LD_LIBRARY_PATH": f"{wheel / 'nvidia_pytriton.libs'}{os.pathsep}{library}"}  # fmt: skip
    with log.open("w") as said, subprocess.Popen(
        [triton / "bin" / "tritonserver", "--model-repository", folder / "models", "--http-address", "127.0.0.1",
         "--backend-directory", folder / "backends", "--http-port", str(port), "--grpc-port", str(grpc),
         "--grpc-address", "127.0.0.1", "--allow-metrics", "false", "--exit-timeout-secs", "5"],
        stdout=said, stderr=said, env={**os.environ, **paths},
    ) as process:  # fmt: skip
        address = f"http://127.0.0.1:{port}/v2"
        try:
            end = time.monotonic() + SECONDS
            while not ready(address):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            yield address, f"127.0.0.1:{grpc}"
        finally:
            process.terminate()
            process.wait(SECONDS)


@pytest.fixture(scope="module")
def server(servers: tuple[str, str]) -> str:
    return servers[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health/ready", timeout=1) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except OSError:
        return False


def infer(address: str, asked: Mapping[str, tuple[str, list[Any]]]) -> tuple[int, dict[str, Any]]:
    """``asked``: Triton's type and values of each input."""
    inputs = [{"name": k, "datatype": t, "shape": [len(v)], "data": v} for k, (t, v) in asked.items()]
    request = urllib.request.Request(f"{address}/models/shoes/infer", json.dumps({"inputs": inputs}).encode())  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310
            return answer.status, {each["name"]: each for each in json.load(answer)["outputs"]}
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_pictures_are_those_of_sample(server: str, fashion_bundle: Path) -> None:
    """Twelve requests at once, of different steps, fractions and numbers of images."""
    asked = [
        {"labels": [str(i % 10), "Bag"][: 1 + i % 2], "steps": 3 + i, "seed": 100 * i, "fraction": i / 12}
        for i in range(12)
    ]
    kinds = {"labels": "BYTES", "steps": "INT32", "seed": "UINT64", "fraction": "FP64"}

    def draw(one: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        as_lists = {k: v if isinstance(v, list) else [v] for k, v in one.items()}
        return infer(server, {name: (kinds[name], values) for name, values in as_lists.items()})

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(draw, asked))
    with tstitch_trt.load(fashion_bundle, threads=1) as runtime:
        for one, (status, outputs) in zip(asked, answers, strict=True):
            assert status == 200, outputs
            alone = runtime.sample(**one)
            found = np.array(outputs["images"]["data"], np.uint8).reshape(outputs["images"]["shape"])
            np.testing.assert_array_less(np.abs(found.astype(int) - alone.images), 2)  # batches of other sizes round
            assert tuple(outputs["seeds"]["data"]) == alone.seeds


def test_a_short_request_overtakes_a_long_one(server: str) -> None:
    ended = []

    def draw(n: int, steps: int) -> None:
        status, _ = infer(server, {"labels": ("BYTES", ["1"]), "n": ("INT32", [n]), "steps": ("INT32", [steps])})
        ended.append((status, steps))

    threads = [threading.Thread(target=draw, args=args) for args in ((3, 80), (1, 2))]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert ended == [(200, 2), (200, 80)]


def test_a_client_that_goes_frees_the_lanes(servers: tuple[str, str], wheels: Path) -> None:
    """Over gRPC: Triton does not tell of clients of HTTP that go."""
    client = unpacked("tritonclient==2.51.0", wheels) / "tritonclient-2.51.0.data" / "purelib"
    packages = (client, unpacked("python-rapidjson==1.23", wheels))
    script = """
import sys, time
import numpy as np
from tritonclient import grpc
client = grpc.InferenceServerClient(sys.argv[1])
asked = {"labels": ("BYTES", np.array([b"1"], object)), "steps": ("INT32", np.array([1000], np.int32)),
         "n": ("INT32", np.array([4], np.int32))}
inputs = [grpc.InferInput(name, [1], kind) for name, (kind, _) in asked.items()]
for each in inputs:
    each.set_data_from_numpy(asked[each.name()][1])
request = client.async_infer("shoes", inputs, lambda result, error: None)
time.sleep(0.5)
request.cancel()
time.sleep(0.1)
"""
    paths = os.pathsep.join(map(str, packages))
    subprocess.run([sys.executable, "-c", script, servers[1]], env={**os.environ, "PYTHONPATH": paths}, check=True)
    began = time.monotonic()
    status, _ = infer(servers[0], {"labels": ("BYTES", ["1"]), "steps": ("INT32", [2])})
    assert status == 200
    assert time.monotonic() - began < 3, "there is no other lane, and 4,000 steps take longer"


def test_what_can_not_be_drawn_is_told(server: str) -> None:
    status, answer = infer(server, {"labels": ("BYTES", ["Boat"])})
    assert status == 400
    assert "hint: did you mean 'Coat'?" in answer["error"]
    status, answer = infer(server, {"labels": ("BYTES", ["1"]), "n": ("INT32", [41])})
    assert status == 400
    assert "allowed are 40" in answer["error"]
    status, answer = infer(server, {"prompt": ("BYTES", ["a fox"])})
    assert status == 400
    assert "prompt" in answer["error"]


def test_a_model_appears_whole_or_not_at_all(fashion_bundle: Path, tmp_path: Path, run: Command) -> None:
    words = ["export-triton", fashion_bundle, "-o", tmp_path / "models"]
    assert run(*words, "--name", "a/b").code == 2
    assert run(*words, "--json").json["model"] == "fashion"
    assert "already" in run(*words).err
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["fashion"]
    assert (tmp_path / "models" / "fashion" / "1" / "model.py").read_text() == MODEL
    with tstitch_trt.load(tmp_path / "models" / "fashion" / "1" / "model.bundle") as runtime:
        assert runtime.members == ("small", "large")
