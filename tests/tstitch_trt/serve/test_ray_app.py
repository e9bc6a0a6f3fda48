"""The server on a local Ray Serve of two engines: one is killed under load, and nothing that was accepted is lost."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import tstitch_trt
from support.rays import RAY_WARNINGS
from tstitch_engines.errors import BadInput

pytestmark = RAY_WARNINGS
ROOT = Path(__file__).parents[3]
GENERATE = "images/generations"
KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def server(address: str, fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from ray import serve

    from tstitch_trt.serve.ray_app import build

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
    # As examples/ray/serve.yaml has it, but on the CPU.
    (application,) = yaml.safe_load((ROOT / "examples" / "ray" / "serve.yaml").read_text())["applications"]
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(KEY)
    here = {"bundles": {"shoes": str(fashion_bundle)}, "device": "cpu", "engines": 2, "most_engines": 2, "fronts": 1}
    serve.run(build({**application["args"], **here, "api_key_file": str(keys)}), name="images", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def call(server: str, path: str, body: Mapping[str, Any] | None = None, key: str = KEY) -> tuple[int, bytes]:
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{server}/v1/{path}", data, headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def pixels(picture: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))).astype(int)


def replicas() -> list[int]:
    """Processes of the engines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name = path.read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::ServeReplica:images:Engine"):
            found.append(int(path.parent.name))
    return found


def test_nothing_accepted_is_lost_with_an_engine(server: str, fashion_bundle: Path) -> None:
    asked = [{"prompt": "Bag", "seed": seed, "steps": 20 + 2 * seed, "n": 1 + seed % 2} for seed in range(16)]
    first = replicas()
    assert len(first) == 2
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = [pool.submit(call, server, GENERATE, body) for body in asked]
        while sum(answer.done() for answer in answers) < 2:
            time.sleep(0.01)
        assert sum(answer.done() for answer in answers) < 12
        os.kill(first[0], signal.SIGKILL)
    with tstitch_trt.load(fashion_bundle, threads=1) as runtime:
        for body, answer in zip(asked, answers, strict=True):
            status, content = answer.result()
            assert status == 200, content
            found = json.loads(content)
            alone = runtime.sample(labels="Bag", seed=body["seed"], steps=body["steps"], n=body["n"]).images
            assert alone is not None
            for one, picture in zip(found["data"], alone, strict=True):
                np.testing.assert_array_less(np.abs(pixels(one["b64_json"]) - picture[:, :, 0]), 2)


def test_it_is_the_same_server(server: str) -> None:
    status, content = call(server, GENERATE, {"prompt": "Boat"})
    assert (status, json.loads(content)["error"]["type"]) == (400, "invalid_request_error")
    assert call(server, "models", key="0" * 32)[0] == 401
    status, content = call(server, "models")
    assert [model["id"] for model in json.loads(content)["data"]] == ["shoes"]
    status, content = call(
        server, GENERATE, {"prompt": "Bag", "steps": 8, "seed": 3, "stream": True, "partial_images": 2}
    )
    events = [line.partition(b": ")[2] for line in content.splitlines() if line.startswith(b"event: ")]
    assert status == 200
    assert events == [b"image_generation.partial_image"] * 2 + [b"image_generation.completed"]


def busy() -> float:
    """The busier of two engines: their lanes at work, and images that wait, over their lanes."""
    from ray import serve

    engines = serve.get_deployment_handle("Engine", "images")
    replies = [engines.record_autoscaling_stats.remote() for _ in range(12)]  # each goes to either of them
    return max(reply.result(timeout_s=20)["busy"] for reply in replies)


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_client_that_goes_frees_the_lanes(server: str) -> None:
    until(lambda: busy() == 0)
    body = json.dumps(
        {"prompt": "Bag", "steps": 250, "n": 10, "guidance": 3, "stream": True, "partial_images": 3}
    ).encode()
    host, _, port = server.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(
            f"POST /v1/{GENERATE} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {KEY}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        until(lambda: busy() > 0)
    began = time.monotonic()
    until(lambda: busy() == 0)
    assert time.monotonic() - began < 3, "2,500 guided steps take longer"


def test_the_page_of_the_cluster_deploys_what_there_is() -> None:
    from ray.serve.schema import ServeDeploySchema

    from tstitch_trt.serve.ray_app import RayOptions

    text = (ROOT / "examples" / "ray" / "serve.yaml").read_text()
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    options = RayOptions(**application.args)
    assert options.load()["device"] == "cuda"
    assert {each.name for each in application.deployments} <= {"Engine", "Front"}
    with pytest.raises(BadInput, match="nobody would need a key"):
        RayOptions(bundles={}).settings()
    with pytest.raises(BadInput, match="both"):
        RayOptions(bundles={}, api_key_file="x", insecure=True).settings()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"bundles": {}}, "bundles"),
        ({"device": "cuda:1"}, "allowed are cpu, cuda"),
        ({"cpus": 0}, "'cpus' is 0"),
        ({"target": 0}, "'target' is 0"),
        ({"engines": 3, "most_engines": 2}, "most_engines is 2"),
        ({"max_lane": 4}, "max_lane"),
    ],
)
def test_args_are_refused_before_anything_is_started(args: Mapping[str, Any], said: str) -> None:
    from tstitch_trt.serve.ray_app import build

    with pytest.raises(BadInput, match=said):
        build({"bundles": {"shoes": "shoes.bundle"}, "insecure": True, **args})


def test_a_time_out_of_0_is_never() -> None:
    from tstitch_trt.serve.ray_app import RayOptions

    assert RayOptions(bundles={"a": "a"}, insecure=True, timeout=0).settings().timeout is None


@contextmanager
def load(server: str, clients: int, steps: int) -> Iterator[list[int]]:
    """The status of every answer to clients that ask one after another."""
    statuses: list[int] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            statuses.append(call(server, GENERATE, {"prompt": "Bag", "steps": steps, "n": 4})[0])

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.slow
def test_engines_follow_the_load_and_a_new_version_loses_nothing(server: str, fashion_bundle: Path) -> None:
    from ray import serve

    from tstitch_trt.serve.ray_app import build

    args = {"bundles": {"shoes": str(fashion_bundle)}, "insecure": True, "most_engines": 2}
    with load(server, 4, 20) as statuses:
        serve.run(build(args), name="images", route_prefix="/")  # another version: every replica is replaced
    assert len(statuses) > 4
    assert set(statuses) == {200}
    serve.delete("images")
    serve.run(build(args), name="images", route_prefix="/")
    until(lambda: len(replicas()) == 1)
    with load(server, 8, 100) as statuses:  # 32 images at a time: one engine has too few lanes
        until(lambda: len(replicas()) == 2, 180)
    assert set(statuses) <= {200, 429}
