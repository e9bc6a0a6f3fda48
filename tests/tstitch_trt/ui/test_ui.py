"""``tstitch-trt ui``: what it draws is what the runtime draws, the page works in a browser and asks nobody else."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tstitch_trt
from support.browser import Watched, browser_page, pixels
from support.command import Command, refused
from support.report_studies import evaluation
from support.studies import search, search_point
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.study.gather import Studies
from tstitch_trt.study.store import save_study, weights_of
from tstitch_trt.ui.draw import enlarged, kept
from tstitch_trt.ui.pareto import pareto


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture(scope="module")
def runtime(fashion_bundle: Path) -> Iterator[Runtime]:
    with tstitch_trt.load(fashion_bundle, threads=1) as loaded:
        yield loaded


# --- what is drawn


def test_small_pictures_are_enlarged_pixel_by_pixel() -> None:
    image = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28, 1)
    large = enlarged(image)
    assert large.shape == (224, 224, 3)
    np.testing.assert_array_equal(large[::8, ::8, 1], image[..., 0])
    assert enlarged(np.zeros((512, 300, 3), np.uint8)).shape == (512, 300, 3)


def test_a_picture_s_file_is_written_once(tmp_path: Path) -> None:
    """The browser may be reading it when the next one is drawn."""
    first, other = np.zeros((28, 28, 1), np.uint8), np.ones((28, 28, 1), np.uint8)
    path = kept(first, tmp_path)
    before = path.stat()
    assert kept(first, tmp_path) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert kept(other, tmp_path) != path
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), enlarged(first))


# --- the plot


def test_the_chosen_point_is_ringed_where_it_was_measured(runtime: Runtime) -> None:
    weights = weights_of(runtime.manifest)
    for studies in (Studies(searches=(search(weights=weights),)), Studies(evaluations=(evaluation(weights=weights),))):
        measured = pareto(
            runtime, studies, "a.bundle", runtime.plan(fraction=0.4, steps=10, guidance=1.0), guidance=1.0
        )
        assert "chosen: small:4,large:6, 10 steps" in measured
        assert "<code>small:4,large:6</code>, 10 steps. Fréchet distance" in measured
        for other in ({"fraction": 0.3}, {"steps": 20}, {"solver": "euler"}):
            plan = runtime.plan(**{"fraction": 0.4, "steps": 10, **other})
            text = pareto(runtime, studies, "a.bundle", plan, guidance=1.0)
            assert "chosen: " not in text
            assert "this schedule was not measured" in text


def test_without_studies_the_commands_are_said(runtime: Runtime) -> None:
    text = pareto(runtime, Studies(), "my a.bundle", runtime.plan(fraction=0.4), guidance=1.0)
    for word in ("evaluate", "search", "calibrate"):
        assert f"tstitch-trt {word} &#39;my a.bundle&#39;" in text
    assert "<svg" not in text


# --- the command


def test_bad_input_is_refused(run: Command, fashion_bundle: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(run("ui", fashion_bundle, "--port", port), f"127.0.0.1:{port}", "--port 0")
    refused(run("ui", fashion_bundle, "--host", "no such host"), "no such host", "127.0.0.1")
    refused(run("ui", fashion_bundle, "--port", 70000), "70000")


def test_without_gradio_it_is_refused_by_name(fashion_bundle: Path) -> None:
    script = "import sys; sys.modules['gradio'] = None\nfrom tstitch_trt.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["ui", str(fashion_bundle), "--port", "0"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "tstitch-trt[ui]" in done.stderr


# --- in a browser


@pytest.fixture(scope="module")
def served(fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """The address of a page over the built-in pair with a search, and its process. It is told to stop by Ctrl-C."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip('gradio is not installed (pip install "tstitch-trt[ui]")')
    root = tmp_path_factory.mktemp("ui") / "fashion.bundle"
    shutil.copytree(fashion_bundle, root)
    bundle = open_bundle(root)
    points = [
        search_point(schedule, value, guidance=bundle.manifest.defaults.guidance)
        for schedule, value in (("small:10", 60.0), ("small:4,large:6", 20.0), ("large:10", 18.0))
    ]
    save_study(bundle, search(weights=weights_of(bundle.manifest), points=tuple(points)))
    log = root.parent / "log.txt"
    temporary = root.parent / "tmp"
    temporary.mkdir()
    words = [sys.executable, "-m", "tstitch_trt.cli", "ui", str(root), "--port", "0", "--threads", "1"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "TMPDIR": str(temporary)}
        )
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:"), log.read_text()
        yield address, process
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert log.read_text() == "Ctrl-C stops it\nstopped\n"
        assert not list(temporary.glob("tstitch-ui-*"))  # the pictures it kept are gone
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def opened(served: tuple[str, Any]) -> Iterator[Watched]:
    """One browser for both tests: it takes seconds to load Gradio's page for the first time."""
    with browser_page(viewport={"width": 1400, "height": 1000}) as seen:
        seen.page.context.set_default_timeout(120_000)
        yield seen


def assert_only_itself(seen: Watched, address: str) -> None:
    asked_of = {url.partition("?")[0] for url in seen.requests if not url.startswith(("data:", "blob:"))}
    assert all(url.startswith(address) for url in asked_of), asked_of
    # Gradio's page ends the stream of an event itself once it has the last message.
    assert [text for text in seen.failed if "/queue/data" not in text] == []
    assert seen.errors == []


def test_a_picture_is_drawn_by_pressing_the_button(served: tuple[str, Any], opened: Watched) -> None:
    page, (address, _) = opened.page, served
    page.goto(address)
    page.wait_for_selector("#plot svg")
    page.fill("#steps input[type=number]", "10")
    page.press("#steps input[type=number]", "Tab")
    page.wait_for_function("document.querySelector('#plot').innerHTML.includes('chosen: small:4,large:6')")
    page.click("#draw")
    page.wait_for_function(
        "[...document.querySelectorAll('#pictures img')].filter(i => i.naturalWidth == 224).length == 3"
    )
    captions = page.inner_text("#pictures")
    for text in ("0%: 10 large", "40%: 4 small + 6 large", "100%: 10 small", "ms per image"):
        assert text in captions
    for selector in ("#pictures", "#plot"):
        picture = pixels(page.locator(selector).screenshot())
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20, selector
    assert_only_itself(opened, address)


def test_an_error_of_ours_is_shown_with_its_hint(served: tuple[str, Any], opened: Watched) -> None:
    address, process = served
    seen = Watched(opened.page.context.new_page())
    page = seen.page
    page.goto(address)
    page.wait_for_selector("#plot svg")
    page.fill("#steps input[type=number]", "200")
    page.press("#steps input[type=number]", "Tab")
    page.click("#solver input")
    page.get_by_role("option", name="lcm", exact=True).click()
    page.wait_for_selector(".toast-wrap >> text=hint:")
    assert "lcm" in page.inner_text(".toast-wrap")
    assert process.poll() is None
    assert_only_itself(seen, address)
