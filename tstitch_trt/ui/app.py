"""The page itself, in Gradio. It works offline: no fonts, scripts or statistics from elsewhere."""

from __future__ import annotations

import asyncio
import html
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tstitch_engines.checks import check_choice, check_number, check_text, check_whole, shown
from tstitch_engines.errors import BadInput, Busy, TStitchError
from tstitch_engines.needs import require
from tstitch_trt.plots.templates import stylesheet
from tstitch_trt.serve.listen import serving as serve_on
from tstitch_trt.solvers import SOLVERS
from tstitch_trt.study.fractions import requests_at
from tstitch_trt.study.gather import gather
from tstitch_trt.ui.draw import kept
from tstitch_trt.ui.drawing import draw_at_once
from tstitch_trt.ui.pareto import pareto

if TYPE_CHECKING:
    from tstitch_trt.serve.engine import Engine
    from tstitch_trt.ui.guard import App
    from tstitch_trt.ui.visitors import Drawings

__all__ = ["build_page", "import_gradio", "serving"]

_BESIDE: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
_MOST_STEPS: Final = 200
_MOST_IMAGES: Final = 8  # per fraction: six of them fit half of the least --max-queue
_MOST_GUIDANCE: Final = 15.0
_LONGEST_PROMPT: Final = 2000  # characters
_PLOT_SECONDS: Final = 3.0  # that a plot waits for others
_STOP_SECONDS: Final = 1.0
_MOST_CONNECTIONS: Final = 256
_MOST_EVENTS: Final = 64  # that Gradio keeps before it has a thread for them
_MOST_SESSIONS: Final = 512


def import_gradio(*, temporary: str) -> Any:
    """Gradio with its statistics and version checks off; pictures on their way to the browser lie in ``temporary``.

    Raises ``Unavailable`` where it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read once, on import
    os.environ["GRADIO_TEMP_DIR"] = temporary  # read when a component is made
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    return require("gradio", "the page", extra="ui")


def build_page(gr: Any, engine: Engine, path: str, *, temporary: Path, drawings: Drawings) -> Any:
    """The page over an engine of one bundle. ``path``: the bundle as it was named; ``temporary``: where pictures are
    kept, below the system's temporary folder. Values from the browser are checked here: what the page offers binds
    nobody who writes requests of his own."""
    runtime = engine.runtime()
    manifest = runtime.manifest
    defaults, conditioning = manifest.defaults, manifest.conditioning
    first, last = runtime.members[0], runtime.members[-1]
    studies = gather(runtime.bundle)
    classes = conditioning.kind == "class"
    plotting = threading.Lock()  # matplotlib draws in one thread at a time

    def asked(
        count: object,
        steps: object,
        seed: object,
        guidance: object,
        solver: object,
        what: object,
        negative: object = "",
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The pictures, and the settings of the plan."""
        if classes:
            pictures: dict[str, Any] = {"labels": [_whole(what, "class", 0, conditioning.classes - 1)]}
        else:
            pictures = {"prompt": _text(what, "prompt")}
            if negative:
                pictures["negative_prompt"] = _text(negative, "negative prompt")
        settings = {
            "steps": _whole(steps, "steps", 1, _MOST_STEPS),
            "solver": check_choice(solver, "solver", SOLVERS),
            "guidance": check_number(guidance, "guidance", 0, _MOST_GUIDANCE),
        }
        images = _whole(count, "images per fraction", 1, _MOST_IMAGES)
        return {**pictures, "n": images, "seed": _whole(seed, "seed", 0, 2**63 - 1)}, settings

    async def drawing(
        asking: gr.Request,
        fraction: object,
        beside: object,
        *request: object,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> AsyncIterator[Any]:
        with _shown(gr):
            pictures, settings = asked(*request)
            chosen = [_fraction(fraction), *_fractions_beside(beside)]
            wanted = sorted({round(one, 4) for one in chosen})
            client = asking.client.host if asking.client else ""
            with drawings.drawing(str(asking.session_hash), client, pictures["n"] * len(wanted)) as mine:

                def tell(words: str, share: float) -> None:
                    progress(share, desc=words)

                shown: dict[tuple[int, int], tuple[str, str]] = {}
                requests = requests_at(manifest, wanted, pictures, settings)
                async for new in draw_at_once(engine, requests, check=mine.check, tell=tell):
                    for place, picture in new.items():
                        path = await asyncio.to_thread(kept, picture.pixels, temporary)
                        shown[place] = (str(path), picture.caption)
                    yield [shown[place] for place in sorted(shown)]

    def plotted(fraction: object, *request: object) -> str:
        with _shown(gr):
            _, settings = asked(*request)
            plan = runtime.plan(fraction=_fraction(fraction), **settings)
            if not plotting.acquire(timeout=_PLOT_SECONDS):
                raise Busy(f"busy with other plots for {_PLOT_SECONDS:.0f} s", hint="move a slider to try again")
            try:
                return pareto(runtime, studies, path, plan, guidance=settings["guidance"])
            finally:
                plotting.release()

    # Gradio reads annotations of arguments as objects, and those of this file are text
    drawing.__annotations__["asking"] = gr.Request

    with gr.Blocks(title=f"{manifest.name}: stitch point") as page:
        gr.Markdown(
            f"# {_plain(manifest.name)}\n`{_plain(first)}` runs the early steps, `{_plain(last)}` the late ones."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                if classes:
                    names = conditioning.names or tuple(f"class {i}" for i in range(conditioning.classes))
                    choices = [(name, index) for index, name in enumerate(names)]
                    what = gr.Dropdown(choices, value=0, label="Class", elem_id="what")
                    texts = [what]
                else:
                    what = gr.Textbox(value="", label="Prompt", lines=3, elem_id="what")
                    texts = [what, gr.Textbox(value="", label="Negative prompt", elem_id="negative")]
                fraction = gr.Slider(
                    0, 1, value=0.4, step=0.05, label=f"Share of the steps on {first}", elem_id="fraction"
                )
                beside = gr.CheckboxGroup(
                    [(f"{f:.0%}", f) for f in _BESIDE], value=[0.0, 1.0], label="Beside it", elem_id="beside"
                )
                go = gr.Button("Draw", variant="primary", elem_id="draw")
                with gr.Accordion("Settings", open=True):
                    steps = gr.Slider(1, _MOST_STEPS, value=defaults.steps, step=1, label="Steps", elem_id="steps")
                    seed = gr.Number(value=0, precision=0, minimum=0, label="Seed", elem_id="seed")
                    guidance = gr.Slider(
                        1,
                        _MOST_GUIDANCE,
                        value=defaults.guidance,
                        step=0.1,
                        label="Guidance (1 is none)",
                        visible=conditioning.guidable,
                        elem_id="guidance",
                    )
                    solver = gr.Dropdown(list(SOLVERS), value=defaults.solver, label="Solver", elem_id="solver")
                    count = gr.Slider(1, _MOST_IMAGES, value=1, step=1, label="Images per fraction", elem_id="count")
            with gr.Column(scale=3):
                gallery = gr.Gallery(
                    label="The same seeds at each fraction",
                    show_label=False,
                    columns=3,
                    height="auto",
                    object_fit="contain",
                    buttons=["download", "fullscreen"],
                    interactive=False,
                    elem_id="pictures",
                )
                plot = gr.HTML(elem_id="plot", label="Time and quality", show_label=False)
        request = [count, steps, seed, guidance, solver, *texts]
        # Gradio begins each at once: the engine has the bound, the order, and the words for both. And it would check
        # some of the values, with words of its own and a trace in the log.
        plain = {"preprocess": False, "concurrency_limit": None}
        go.click(drawing, [fraction, beside, *request], gallery, **plain)
        marks = [fraction.change, steps.change, guidance.change, solver.change, page.load]
        for event in marks:
            event(plotted, [fraction, *request], plot, show_progress="hidden", trigger_mode="always_last", **plain)
    return page


@contextmanager
def serving(gr: Any, page: Any, listening: socket.socket, guarded: Callable[..., App]) -> Iterator[None]:
    """The page on the network while the block runs. ``guarded`` puts the guard around Gradio's application, given the
    number of values of each of the page's events."""
    import fastapi

    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    page.queue(max_size=_MOST_EVENTS, api_open=False)
    page.state_session_capacity = _MOST_SESSIONS
    # Not page.launch: variables of the environment could make it share the page, or serve files beside the guard
    plain = fastapi.FastAPI(openapi_url=None)
    app = gr.mount_gradio_app(
        plain,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        head=f"<style>{stylesheet('tstitch_trt.ui')}</style>",
    )
    guard = guarded(app, events={index: len(event.inputs) for index, event in page.fns.items()})
    # Streams of open pages have no end: they are cut off
    with serve_on(
        guard, listening, what="the page", extra="ui", most_connections=_MOST_CONNECTIONS, finish=_STOP_SECONDS
    ):
        yield


@contextmanager
def _shown(gr: Any) -> Iterator[None]:
    """Our errors, message and hint, as a notice on the page; others go through with their trace in the log."""
    try:
        yield
    except TStitchError as error:
        text = f"{html.escape(error.message)}<br><b>hint:</b> {html.escape(error.hint)}"
        raise gr.Error(text, duration=None, print_exception=False) from None


def _plain(text: str) -> str:
    """``text`` where Markdown is expected: no markup in it."""
    return html.escape(text).replace("`", "").replace("[", "(").replace("]", ")")


def _whole(value: object, what: str, low: int, high: int) -> int:
    """JSON has one kind of numbers: 5.0 is a whole one."""
    return check_whole(int(value) if isinstance(value, float) and value.is_integer() else value, what, low, high)


def _text(value: object, what: str) -> str:
    return check_text(value, what, example="a red fox", most=_LONGEST_PROMPT)


def _fraction(value: object) -> float:
    return check_number(value, "share of the steps", 0, 1)


def _fractions_beside(values: object) -> list[float]:
    if not isinstance(values, list) or len(values) > len(_BESIDE):
        raise BadInput(f"beside it is {shown(values)}; allowed are shares of the steps", hint="tick the boxes")
    return [_fraction(value) for value in values]
