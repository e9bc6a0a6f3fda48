"""``tstitch-trt ui``: what it draws is what the runtime draws, the page works in a browser and asks nobody else."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tstitch_trt
from support.browser import Watched, browser_page, letter_heights, pixels
from support.command import Command, refused
from support.hand_made import made_member, text_bundle
from support.hand_made_parts import FACTOR, made_text_encoder, made_vae, word_tokenizer
from support.page_client import DRAW, OPEN, PLOT, Visitor, raw
from support.report_studies import evaluation
from support.studies import calibration, overhead, search, search_point
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.bundle.manifest import Decoder, Defaults, TextInputs
from tstitch_engines.spec import Range
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.study.budget import Conditions
from tstitch_trt.study.budget.conditions import engine_digests
from tstitch_trt.study.gather import Studies
from tstitch_trt.study.store import save_study, weights_of
from tstitch_trt.ui.draw import enlarged, kept
from tstitch_trt.ui.gallery import Predicted
from tstitch_trt.ui.pareto import pareto, predicted

HOSTILE = "</script><img src=x onerror=document.title='run'>${document.title='run'} {{1}} `b` [a](javascript:x)"

LOADED = "[...document.querySelectorAll('#pictures img')].filter(image => image.naturalWidth).length == 3"
TOKEN = "a-token-of-the-test"  # noqa: S105


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


def test_the_folder_of_pictures_is_bounded(tmp_path: Path) -> None:
    def drawn(value: int, **bound: int) -> Path:
        return kept(np.full((28, 28, 1), value, np.uint8), tmp_path, **bound)

    first, second, third = (drawn(value, most=3) for value in range(3))
    os.utime(second, ns=(1, 1))
    assert drawn(0, most=3) == first  # is used again
    drawn(3, most=3)
    assert first.exists()
    assert not second.exists()
    last = drawn(4, most_bytes=1)  # the one that is about to be shown stays
    assert list(tmp_path.iterdir()) == [last]
    assert not third.exists()


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


def test_the_speed_up_is_predicted_by_a_calibration_that_holds_here(fashion_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(shutil.copytree(fashion_bundle, tmp_path / "fashion.bundle"))
    settings: dict[str, Any] = {"steps": 10, "guidance": 1.0, "solver": "ddim"}
    with tstitch_trt.load(bundle, threads=1) as runtime:
        plans = [runtime.plan(fraction=fraction, **settings) for fraction in (0.4, 1.0)]
        assert predicted(runtime, plans, settings, 8) is None
        cost = calibration(  # 1 and 10 ms a step on eight images
            weights=weights_of(bundle.manifest), engines=engine_digests(bundle, "onnxruntime", "cpu"),
            splitting=runtime.splitting, overheads=(overhead(8, 0.0),),
        )  # fmt: skip
        save_study(bundle, cost, key=Conditions.of(cost).key)
        found = predicted(runtime, plans, settings, 8)
        assert found == Predicted([64 / 8, 10 / 8], 100 / 8, "2024-01-02 03:04 UTC")
        assert predicted(runtime, plans, settings, 1) is None  # nothing is extrapolated


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


class Page:
    """``tstitch-trt ui`` as a process. ``temporary``: where it keeps its pictures."""

    def __init__(self, bundle: Path, folder: Path, *options: str) -> None:
        self.log, self.temporary = folder / "log.txt", folder / "tmp"
        self.temporary.mkdir()
        words = [sys.executable, "-m", "tstitch_trt.cli", "ui", str(bundle), "--port", "0", "--threads", "1", *options]
        env = {
            **os.environ, "TMPDIR": str(self.temporary), "GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "true",
        }  # fmt: skip
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)

    @cached_property
    def printed(self) -> str:
        """The address that the command printed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line.startswith("http://127.0.0.1:"), self.log.read_text()
        return line

    @property
    def address(self) -> str:
        return self.printed.partition("?")[0]

    def pictures(self) -> list[Path]:
        return list(self.temporary.glob("tstitch-ui-*"))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def pages(fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, Page]]:
    """A page over the built-in pair with a search and hostile names, and one with a token over a pair that reads
    prompts: 4 words a chunk, 12 at most. They start side by side."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip('gradio is not installed (pip install "tstitch-trt[ui]")')
    first, second = (tmp_path_factory.mktemp(name) for name in ("classes", "prompts"))
    (second / "token.txt").write_text(TOKEN)
    found = []
    try:
        found.append(Page(_hostile(fashion_bundle, first), first))
        found.append(Page(_reading(second), second, "--token-file", str(second / "token.txt")))
        yield found[0], found[1]
    finally:
        for page in found:
            page.kill()


def _hostile(fashion_bundle: Path, folder: Path) -> Path:
    root = folder / "fashion.bundle"
    shutil.copytree(fashion_bundle, root)
    manifest = json.loads((root / "manifest.json").read_bytes())
    manifest["name"] = HOSTILE
    manifest["conditioning"]["names"] = [f"{index} {HOSTILE}" for index in range(10)]
    manifest["defaults"]["steps"] = 10
    (root / "manifest.json").write_text(json.dumps(manifest))
    bundle = open_bundle(root)
    points = [
        search_point(schedule, value, guidance=bundle.manifest.defaults.guidance)
        for schedule, value in (("small:10", 60.0), ("small:4,large:6", 20.0), ("large:10", 18.0))
    ]
    save_study(bundle, search(weights=weights_of(bundle.manifest), points=tuple(points)))
    return root


def _reading(folder: Path) -> Path:
    text = TextInputs(hidden=("text_encoder",), width=5)
    inputs: dict[str, tuple[int | str, ...]] = {"encoder_hidden_states": ("T", 5)}
    members = {name: made_member(name, inputs=inputs, text=text) for name in ("small", "large")}
    encoder, _ = made_text_encoder(5, 3, 1)
    made = text_bundle(
        folder / "text.bundle", members, parts={"text_encoder": encoder, "vae_decoder": made_vae()[0]},
        files={"text_encoder": {"tokenizer": word_tokenizer(folder / "tokenizer.json")}}, tokens=Range(6, 6, 18),
        decoder=Decoder(kind="vae", factor=FACTOR), defaults=Defaults(steps=6, schedule="small:0.5,large"),
    )  # fmt: skip
    return made.root


@pytest.fixture(scope="module")
def served(pages: tuple[Page, Page]) -> str:
    return pages[0].address


@pytest.fixture(scope="module")
def opened() -> Iterator[Watched]:
    """One browser for all tests: it takes seconds to load Gradio's page for the first time."""
    with browser_page(viewport={"width": 1400, "height": 1000}) as seen:
        seen.page.context.set_default_timeout(60_000)
        yield seen


def test_what_a_visitor_writes_by_hand_is_refused_by_name(served: str) -> None:
    """The page's own bounds bind nobody; and what is refused leaves no trace of Python's anywhere."""
    address = served
    with Visitor(address, "by-hand-1") as visitor:
        cases: dict[int, tuple[str, list[Any]]] = {
            0: ("share of the steps", [2, "x", None, [0.1]]), 1: ("beside it", [None, [0] * 16]),
            2: ("images per fraction", [9, 0, 1.5, "1", 10**9, True]), 3: ("steps", [201, 0, 10**9, None, 1e308]),
            4: ("seed", [-1, 1e30, "a"]), 5: ("guidance", [16, None]), 6: ("solver", ["no", 5, None]),
            7: ("class", [10, -1, 1e300, HOSTILE]),
        }  # fmt: skip
        for place, (name, values) in cases.items():
            for turn, value in enumerate(values):
                data = [*visitor.request[:place], value, *visitor.request[place + 1 :]]
                plotted = turn % 2 == 1 and place != 1
                joined = visitor.join([data[0], *data[2:]], PLOT) if plotted else visitor.join(data, DRAW)
                assert joined.status_code == 200
                said = visitor.outcome()
                assert not said["success"], (place, value)
                assert name in said["output"]["error"], said
                assert "<script" not in said["output"]["error"]
                assert "Traceback" not in json.dumps(said)
        for fields in ({"fn": 999}, {"fn": -1}, {"data": [{"path": "/etc/passwd"}] * 8}, {"data": []}):
            assert visitor.join(**fields).status_code == 422
        assert visitor.join().status_code == 200
        picture = visitor.pictures()[0]
        assert visitor.client.get(picture).content.startswith(b"\x89PNG")
        folder = picture.partition("=")[2].rpartition("/")[0]
        for path in (
            "/etc/passwd",
            f"{folder}/../../../../etc/passwd",
            "%2Fetc%2Fpasswd",
            folder,
            f"{folder}/",
            __file__,
        ):
            assert visitor.client.get(f"/gradio_api/file={path}").status_code == 404
        host = address.removeprefix("http://").strip("/")
        for line in (
            f"GET /gradio_api/file={folder}/../x.png",
            "GET /assets/../../../../../etc/passwd",
            "GET //etc/passwd",
        ):
            assert (
                b" 404 " in raw(address, f"{line} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())[:20]
            )
        upgrade = f"GET / HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n"
        assert b" 101 " not in raw(address, upgrade.encode())[:20]
        assert visitor.client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404
        assert visitor.client.get("/", headers={"host": "evil.example"}).status_code == 421


def test_visitors_who_draw_at_once_get_their_own_pictures(served: str, runtime: Runtime) -> None:
    address = served

    def drawn(label: int) -> np.ndarray:
        with Visitor(address, f"visitor-{label}", steps=4) as visitor:
            visitor.request[-1] = label
            assert visitor.join().status_code == 200
            (url,) = visitor.pictures()
            return np.asarray(Image.open(io.BytesIO(visitor.client.get(url).content)))

    with ThreadPoolExecutor(4) as pool:
        for label, picture in enumerate(pool.map(drawn, range(4))):
            alone = runtime.sample(labels=[label], seed=0, steps=4, fraction=0.4, guidance=1.5, solver="ddim").images
            assert alone is not None
            np.testing.assert_array_equal(picture, enlarged(alone[0]))


def test_a_closed_page_s_drawing_ends_and_the_next_one_is_drawn(served: str) -> None:
    address = served
    with Visitor(address, "leaves-early", steps=200, count=8) as first, Visitor(address, "stays-long") as second:
        first.request[1] = [0, 0.25, 0.5, 0.75, 1]
        assert first.join().status_code == 200
        with closing(first.messages()) as messages:
            next(message for message in messages if message["msg"] == "process_generating")
            assert first.join().status_code == 200
            refusal = next(message for message in messages if message["msg"] == "process_completed")
            assert "this page draws already" in refusal["output"]["error"]
        first.client.close()
        began = time.monotonic()
        assert second.join().status_code == 200
        assert second.outcome()["success"]
        assert time.monotonic() - began < 60  # the first would have been drawn for minutes


def assert_only_itself(seen: Watched, address: str) -> None:
    asked_of = {url.partition("?")[0] for url in seen.requests if not url.startswith(("data:", "blob:"))}
    assert all(url.startswith(address) for url in asked_of), asked_of
    # Gradio's page ends the stream of an event itself once it has the last message; and a preview that is replaced
    # while it is loaded is no failure.
    failed = [text for text in seen.failed if not ("/file=" in text and text.endswith("net::ERR_ABORTED"))]
    assert [text for text in failed if "/queue/data" not in text] == []
    assert seen.errors == []


def test_a_page_opens_with_an_example(served: str, opened: Watched) -> None:
    page = opened.page
    page.goto(served)
    page.wait_for_selector("#status >> text=This is an example")
    page.wait_for_function(LOADED)
    with Visitor(served, "second-one") as second:  # for whom it is not drawn again
        assert second.join([], OPEN).status_code == 200
        assert second.pictures() == page.locator("#pictures img").evaluate_all(
            "all => all.map(image => image.getAttribute('src'))"
        )


def test_pictures_stand_in_a_column_per_fraction_and_a_row_per_seed(served: str, opened: Watched) -> None:
    seen = Watched(opened.page.context.new_page())
    page = seen.page
    page.goto(served)
    page.wait_for_selector("#plot svg:visible")
    page.wait_for_function("document.querySelector('#plot').innerHTML.includes('chosen: small:4,large:6')")
    page.get_by_label("50%").check()
    page.fill("#count input[type=number]", "2")
    page.press("#count input[type=number]", "Tab")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#pictures').innerText.split('as fast').length == 4")
    page.wait_for_function(
        "[...document.querySelectorAll('#pictures img')].filter(i => i.naturalWidth == 224).length == 8"
    )
    heads = page.locator("#pictures thead th").all_inner_texts()
    for head, text in zip(heads, ("10 large", "4 small + 6 large", "5 small + 5 large", "10 small"), strict=True):
        assert text in head
        assert "ms per image" in head
    rows = [
        [cell.bounding_box() for cell in row.locator("img").all()] for row in page.locator("#pictures tbody tr").all()
    ]
    tops = [
        box["x"] + box["width"] / 2 for box in (th.bounding_box() for th in page.locator("#pictures thead th").all())
    ]
    assert [len(row) for row in rows] == [4, 4]
    for row in rows:
        assert len({round(box["y"]) for box in row}) == 1
        assert [box["x"] + box["width"] / 2 for box in row] == pytest.approx(tops, abs=1)
        assert all(box["width"] == pytest.approx(box["height"], abs=1) for box in row)
    assert [th.split() for th in page.locator("#pictures tbody th").all_inner_texts()] == [["seed", "0"], ["seed", "1"]]
    for selector in ("#pictures", "#plot"):
        picture = pixels(page.locator(selector).screenshot())
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20, selector
    assert page.title() == f"{HOSTILE}: stitch point"
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("[href^=javascript]").count() == 0
    assert HOSTILE in (page.locator("#pictures img").first.get_attribute("alt") or "")
    assert_only_itself(seen, served)


@pytest.mark.parametrize("width", [360, 390])
def test_on_a_phone_nothing_overlaps_or_leaves_the_page(served: str, opened: Watched, width: int) -> None:
    page = opened.page
    page.set_viewport_size({"width": width, "height": 800})
    try:
        page.goto(served)
        page.wait_for_selector("#plot svg:visible")
        page.wait_for_function(
            "[...document.querySelectorAll('#pictures img')].filter(i => i.naturalWidth).length == 3"
        )
        assert page.evaluate("document.documentElement.scrollWidth") == width
        last = page.locator("#pictures img").nth(2).bounding_box()
        assert last["x"] + last["width"] <= width  # three columns need no scrolling
        for head, image in zip(
            page.locator("#pictures thead th").all(), page.locator("#pictures img").all(), strict=True
        ):
            above, below = head.bounding_box(), image.bounding_box()
            assert above["y"] + above["height"] <= below["y"]
            assert below["width"] > 60
        letters = letter_heights(page.locator("#plot svg:visible text"))
        assert len(letters) > 8
        assert min(letters) >= 10
    finally:
        page.set_viewport_size({"width": 1400, "height": 1000})


def test_tokens_are_counted_while_somebody_types(pages: tuple[Page, Page], opened: Watched) -> None:
    page, prompted = opened.page, pages[1].address
    assert pages[1].printed == f"{prompted}?token={TOKEN}"
    page.goto(pages[1].printed)
    page.wait_for_selector("#pictures img")  # the example

    def typed(words: int, said: str, button: str) -> None:
        page.fill("#what textarea", "fox " * words)
        page.wait_for_function("said => document.querySelector('#tokens').innerText.trim() == said", arg=said)
        page.wait_for_function("said => document.querySelector('#draw').innerText.trim() == said", arg=button)
        assert page.is_enabled("#draw") == (button == "Draw")

    typed(3, "3 of 4 tokens", "Draw")
    typed(9, "9 tokens, read in 3 chunks of 4", "Draw")
    typed(13, "13 tokens; at most 12 fit", "Prompt too long: 13 of 12 tokens")
    with Visitor(prompted, "by-hand-2") as visitor:
        visitor.client.get("/", params={"token": TOKEN})
        visitor.request[-1:] = ["fox " * 13, ""]
        assert visitor.join().status_code == 200
        assert "the prompt has 13 tokens; the engines take 12" in visitor.outcome()["output"]["error"]
    typed(12, "12 tokens, read in 3 chunks of 4", "Draw")
    page.click("#draw")
    page.wait_for_selector("#pictures img[alt^='fox fox'][alt$='seed 0, 0% of the steps on small']")


def test_an_error_of_ours_is_shown_with_its_hint(served: str, opened: Watched) -> None:
    seen = Watched(opened.page.context.new_page())
    page = seen.page
    page.goto(served)
    page.wait_for_selector("#plot svg:visible")
    page.fill("#steps input[type=number]", "200")
    page.press("#steps input[type=number]", "Tab")
    page.click("#solver input")
    page.get_by_role("option", name="lcm", exact=True).click()
    page.wait_for_selector(".toast-wrap >> text=hint:")
    assert "lcm" in page.inner_text(".toast-wrap")
    assert_only_itself(seen, served)


# --- how it stops: the last tests, which stop the pages


def test_ctrl_c_stops_an_idle_page(pages: tuple[Page, Page]) -> None:
    page = pages[0]
    assert page.address
    assert page.pictures()
    page.process.send_signal(signal.SIGINT)
    assert page.process.wait(60) == 0
    assert page.log.read_text() == "Ctrl-C stops it\nstopped\n"  # nothing that visitors sent left a trace
    assert not page.pictures()


def test_a_page_with_a_token_that_is_terminated_while_it_draws(pages: tuple[Page, Page]) -> None:
    page = pages[1]
    with Visitor(page.address, "the-visitor", steps=200, count=8) as visitor:
        visitor.request[-1:] = ["fox", ""]
        assert visitor.client.get("/").status_code == 401
        assert visitor.join().status_code == 401
        assert visitor.client.get("/", params={"token": TOKEN}).status_code == 200
        assert visitor.client.get("/").status_code == 200
        assert visitor.join().status_code == 200
        with closing(visitor.messages()) as messages:
            next(message for message in messages if message["msg"] == "process_generating")
            began = time.monotonic()
            page.process.send_signal(signal.SIGTERM)
            assert page.process.wait(30) == 143
    assert time.monotonic() - began < 15
    assert page.log.read_text() == "Ctrl-C stops it\nterminated\n"
    assert not page.pictures()
