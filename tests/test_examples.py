"""``examples/``: each does what its first lines say."""

from __future__ import annotations

import importlib
import io
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import tstitch_trt
from support.browser import browser_page
from support.served import served
from tstitch_trt import Cancelled

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def alone(fashion_bundle: Path) -> NDArray[np.uint8]:
    """Class 7 at seeds 3 and 4, in 10 steps."""
    with tstitch_trt.load(fashion_bundle, threads=1) as runtime:
        images = runtime.sample(labels=[7], n=2, seed=3, steps=10, fraction=0.4, guidance=1.5).images
    assert images is not None
    return images


def test_every_example_is_in_their_list() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    for name in {path.name for path in EXAMPLES.iterdir()} - {"README.md", "__pycache__"}:
        assert f"({name}" in listed, name


@pytest.mark.parametrize("example", ["embed_fastapi"], indirect=True)
def test_embedding_in_fastapi(
    example: ModuleType, fashion_bundle: Path, alone: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastapi.testclient import TestClient

    lines = (EXAMPLES / "embed_fastapi.py").read_text().splitlines()
    assert len([line for line in lines if line]) <= 40
    monkeypatch.setenv("BUNDLE", str(fashion_bundle))
    with TestClient(example.app) as client:
        answer = client.get("/classes/7.png", params={"steps": 10, "seed": 3})
        assert answer.headers["content-type"] == "image/png"
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), alone[0, ..., 0])
        refusal = client.get("/classes/99.png")
        assert refusal.status_code == 400
        assert "99" in refusal.json()["detail"]
        assert client.get("/classes/7.png", params={"steps": 101}).status_code == 422


@pytest.mark.parametrize("example", ["batch_job"], indirect=True)
def test_a_batch_job(
    example: ModuleType, fashion_bundle: Path, alone: NDArray[np.uint8], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    jobs, pictures = tmp_path / "jobs.jsonl", tmp_path / "pictures"
    lines = [{"name": f"sneaker-{seed}", "label": 7, "seed": seed, "steps": 10} for seed in (3, 4)]
    jobs.write_text("\n".join(json.dumps(line) for line in [lines[0], {"name": "none", "label": 99}]))
    assert example.main(str(fashion_bundle), str(jobs), str(pictures)) == 1
    assert capsys.readouterr().err.startswith("none: ")
    first = (pictures / "sneaker-3.png").stat()
    jobs.write_text("\n".join(json.dumps(line) for line in lines))
    assert example.main(str(fashion_bundle), str(jobs), str(pictures)) == 0
    assert (pictures / "sneaker-3.png").stat() == first  # it went on
    for image, seed in enumerate((3, 4)):
        np.testing.assert_array_equal(np.asarray(Image.open(pictures / f"sneaker-{seed}.png")), alone[image, ..., 0])
    assert sorted(path.name for path in pictures.iterdir()) == ["sneaker-3.png", "sneaker-4.png"]
    jobs.write_text('{"name": "../outside", "label": 1}')
    with pytest.raises(SystemExit, match=r"jobs\.jsonl, line 1: "):
        example.main(str(fashion_bundle), str(jobs), str(pictures))


@pytest.mark.parametrize("example", ["comfyui_node"], indirect=True)
def test_a_comfyui_node(
    example: ModuleType, fashion_bundle: Path, alone: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called as ComfyUI calls it; what it has there is its progress bar, which raises where a user pressed Cancel."""
    (node,) = example.NODE_CLASS_MAPPINGS.values()
    inputs = node.INPUT_TYPES()
    given = {name: kind[1]["default"] for name, kind in inputs["required"].items()}
    given |= {"bundle": str(fashion_bundle), "what": "Sneaker", "steps": 10, "seed": 3, "count": 2}
    draw = getattr(node(), node.FUNCTION)
    (images,) = draw(**given)
    assert images.shape == (2, 28, 28, 3)
    np.testing.assert_array_equal((images.numpy()[..., 1] * 255).round().astype(np.uint8), alone[..., 0])

    class Pressed:
        def update(self, steps: int) -> None:
            raise Cancelled("pressed", hint="")

    engine = example.engine_of(str(fashion_bundle), "cpu")
    monkeypatch.setattr(example, "progress_bar", lambda steps: Pressed())
    with engine, pytest.raises(Cancelled, match="pressed"):
        draw(**{**given, "steps": 1000})
    example.engine_of.cache_clear()


@pytest.fixture
def site() -> Iterator[str]:
    """Where ``examples/`` is shown."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(EXAMPLES))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_page_in_a_browser(fashion_bundle: Path, site: str, tmp_path: Path) -> None:
    with browser_page() as seen:
        options = ("--no-warm-up", "--cors-origin", site)
        with served(fashion_bundle, log=tmp_path / "log.txt", options=options) as server:
            server.until(lambda: server.ready() == 200)
            page = seen.page
            page.goto(f"{site}/browser.html?server={server.address.rstrip('/')}")
            page.click("#draw")
            page.wait_for_function("said.textContent == 'drawn' && picture.naturalWidth == 28")
            page.fill("#steps", "250")
            page.click("#draw")
            page.wait_for_function("said.textContent == 'drawing'")
            page.click("#stop")
            page.wait_for_function("said.textContent == 'stopped'")
            cancelled = 'tstitch_requests_finished_total{model="fashion",outcome="cancelled"}'
            server.until(lambda: server.metrics().get(cancelled) == 1)
            assert seen.errors == []
            page.fill("#steps", "4")
            page.fill("#prompt", "a horse")
            page.click("#draw")
            page.wait_for_function("said.textContent.includes('horse')")
