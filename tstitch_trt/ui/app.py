"""The page itself, in Gradio. It works offline: no fonts, scripts or statistics from elsewhere."""

from __future__ import annotations

import asyncio
import html
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tstitch_engines.checks import check_choice, check_number, check_text, check_whole, shown
from tstitch_engines.errors import BadInput, Busy, TStitchError
from tstitch_engines.needs import require
from tstitch_trt.plots.templates import stylesheet
from tstitch_trt.serve.listen import serving as serve_on
from tstitch_trt.solvers import SOLVERS
from tstitch_trt.study.fractions import counts_text, requests_at
from tstitch_trt.study.gather import gather
from tstitch_trt.ui.drawing import Column, StepTimes, draw_in_turn
from tstitch_trt.ui.example import Example, Shown
from tstitch_trt.ui.gallery import Gallery
from tstitch_trt.ui.pareto import pareto, predicted
from tstitch_trt.ui.tokens import check_lengths, lengths, token_counts, too_long

if TYPE_CHECKING:
    from tstitch_trt.serve.engine import Engine
    from tstitch_trt.ui.guard import App
    from tstitch_trt.ui.visitors import Drawings

__all__ = ["Page", "build_page", "import_gradio", "serving"]

_BESIDE: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
_MOST_STEPS: Final = 200
_MOST_IMAGES: Final = 8  # per fraction: six of them fit half of the least --max-queue
_MOST_GUIDANCE: Final = 15.0
_LONGEST_PROMPT: Final = 2000  # characters
_FRACTION: Final = 0.4
_DRAW: Final = "Draw"
_TEXTS: Final = ("Prompt", "Negative prompt")
_EXAMPLE_PROMPT: Final = "a red fox in the snow, watercolour"
_EXAMPLE_SECONDS: Final = 60.0  # for a fraction of the example; where it would take longer there is none
_LOOK_SECONDS: Final = 0.1  # between two looks at the example
_TYPING_SECONDS: Final = 0.25  # between two counts of the tokens while somebody types
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


@dataclass(frozen=True)
class Page:
    """``blocks``: Gradio's. ``example``: what it opens with."""

    blocks: Any
    example: Example


def build_page(gr: Any, engine: Engine, path: str, *, temporary: Path, drawings: Drawings, times: StepTimes) -> Page:
    """The page over an engine of one bundle. ``path``: the bundle as it was named; ``temporary``: where pictures are
    kept, below the system's temporary folder; ``times``: the engine's observer. Values from the browser are checked
    here: what the page offers binds nobody who writes requests of his own."""
    runtime = engine.runtime()
    manifest = runtime.manifest
    defaults, conditioning = manifest.defaults, manifest.conditioning
    first, last = runtime.members[0], runtime.members[-1]
    studies = gather(runtime.bundle)
    classes = conditioning.kind == "class"
    names = (conditioning.names or tuple(f"class {i}" for i in range(conditioning.classes))) if classes else ()
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

    async def drawn(
        pictures: dict[str, Any], settings: dict[str, Any], wanted: Sequence[float], *, check: Callable[[], None],
        note: str = "", most_seconds: float | None = None,
    ) -> AsyncIterator[Shown]:  # fmt: skip
        """The line of progress and the pictures, whenever there is news."""
        plans = [runtime.plan(fraction=fraction, **settings) for fraction in wanted]
        seeds = range(pictures["seed"], pictures["seed"] + pictures["n"])
        gallery = Gallery(
            [
                Column(fraction, counts_text(plan.schedule.counts), len(seeds) * len(plan.schedule), words="waits")
                for fraction, plan in zip(wanted, plans, strict=True)
            ],
            seeds, names[pictures["labels"][0]] if classes else pictures["prompt"], (first, last), temporary, note=note,
        )  # fmt: skip
        if 0 not in wanted:
            gallery.predicted = await asyncio.to_thread(predicted, runtime, plans, settings, len(seeds))
        html = gallery.html()
        yield gallery.status(), html
        requests = requests_at(manifest, wanted, pictures, settings)
        async for place, column, new in draw_in_turn(engine, requests, times, check=check, most_seconds=most_seconds):
            await gallery.put(place, column, new)
            if new:
                html = gallery.html()
            yield gallery.status(), html

    def example() -> AsyncIterator[Shown]:
        pictures, settings = asked(
            1, defaults.steps, 0, defaults.guidance, defaults.solver, 0 if classes else _EXAMPLE_PROMPT
        )
        note = "This is an example. Press Draw for your own."
        wanted = (0.0, _FRACTION, 1.0)
        return drawn(pictures, settings, wanted, check=lambda: None, note=note, most_seconds=_EXAMPLE_SECONDS)

    shown_first = Example(example)

    async def opening(asking: gr.Request) -> AsyncIterator[Any]:
        """The example, until the visitor draws."""
        session = str(asking.session_hash)
        visit, before = drawings.visit(session), None
        while not (drawings.draws(session) or visit.gone):
            if not len(drawings):
                shown_first.start()
            if shown_first.shown is not before:
                before = shown_first.shown
                yield [*before]
            if shown_first.over:
                return
            await asyncio.sleep(_LOOK_SECONDS)

    async def drawing(asking: gr.Request, fraction: object, beside: object, *request: object) -> AsyncIterator[Any]:
        with _shown(gr):
            pictures, settings = asked(*request)
            if not classes:
                check_lengths(lengths(runtime, dict(zip(_TEXTS, request[-2:], strict=True))))
            wanted = sorted({round(one, 4) for one in [_fraction(fraction), *_fractions_beside(beside)]})
            client = asking.client.host if asking.client else ""
            with drawings.drawing(str(asking.session_hash), client, pictures["n"] * len(wanted)) as mine:
                await shown_first.stop()
                shown = None
                try:
                    async for shown in drawn(pictures, settings, wanted, check=mine.check):
                        yield [*shown]
                except TStitchError:
                    if shown is not None:
                        yield ["", shown[1]]
                    raise

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

    async def counted(*written: object) -> list[Any]:
        """The tokens of prompt and negative prompt, and the button."""
        await asyncio.sleep(_TYPING_SECONDS)  # the next event begins when this one ends, with the newest texts
        cut = {
            name: text[:_LONGEST_PROMPT] for name, text in zip(_TEXTS, written, strict=True) if isinstance(text, str)
        }
        found = await asyncio.to_thread(lengths, runtime, cut)
        reason = too_long(found)
        return [token_counts(found), gr.Button(reason or _DRAW, interactive=not reason)]

    # Gradio reads annotations of arguments as objects, and those of this file are text
    drawing.__annotations__["asking"] = opening.__annotations__["asking"] = gr.Request

    with gr.Blocks(title=f"{manifest.name}: stitch point") as page:
        gr.Markdown(
            f"# {_plain(manifest.name)}\n`{_plain(first)}` runs the early steps, `{_plain(last)}` the late ones."
        )
        with gr.Column(elem_id="layout"):
            with gr.Column(elem_id="controls"):
                if classes:
                    choices = [(name, index) for index, name in enumerate(names)]
                    texts = [gr.Dropdown(choices, value=0, label="Class", elem_id="what")]
                else:
                    texts = [
                        gr.Textbox(value=_EXAMPLE_PROMPT, label=_TEXTS[0], lines=3, elem_id="what"),
                        gr.Textbox(value="", label=_TEXTS[1], elem_id="negative"),
                    ]
                    tokens = gr.HTML(elem_id="tokens", show_label=False, padding=False)
                fraction = gr.Slider(
                    0, 1, value=_FRACTION, step=0.05, label=f"Share of the steps on {first}", elem_id="fraction"
                )
                beside = gr.CheckboxGroup(
                    [(f"{f:.0%}", f) for f in _BESIDE], value=[0.0, 1.0], label="Beside it", elem_id="beside"
                )
                go = gr.Button(_DRAW, variant="primary", elem_id="draw")
            with gr.Column(elem_id="result"):
                status = gr.HTML(elem_id="status", show_label=False, padding=False)
                gallery = gr.HTML(elem_id="pictures", show_label=False, padding=False)
            with gr.Accordion("Settings", open=True, elem_id="settings"):
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
            plot = gr.HTML(elem_id="plot", show_label=False, padding=False)
        request = [count, steps, seed, guidance, solver, *texts]
        # Gradio begins each at once: the engine has the bound, the order, and the words for both. And it would check
        # some of the values, with words of its own and a trace in the log.
        plain = {"preprocess": False, "concurrency_limit": None, "show_progress": "hidden"}
        go.click(drawing, [fraction, beside, *request], [status, gallery], **plain)
        marks = [fraction.change, steps.change, guidance.change, solver.change, page.load]
        for event in marks:
            event(plotted, [fraction, *request], plot, trigger_mode="always_last", **plain)
        page.load(opening, [], [status, gallery], **plain)
        if not classes:
            for event in [*(text.change for text in texts), page.load]:
                event(counted, texts, [tokens, go], trigger_mode="always_last", **plain)
    return Page(page, shown_first)


@contextmanager
def serving(
    gr: Any, page: Page, listening: socket.socket, guarded: Callable[..., App], *, pictures: Path
) -> Iterator[None]:
    """The page on the network while the block runs; its example is drawn at once.

    ``guarded`` puts the guard around Gradio's application, given the number of values of each of the page's events.
    ``pictures``: the folder of the pictures that it shows.
    """
    import fastapi

    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    blocks = page.blocks
    blocks.queue(max_size=_MOST_EVENTS, api_open=False)
    blocks.state_session_capacity = _MOST_SESSIONS

    @asynccontextmanager
    async def opened(_: object) -> AsyncIterator[None]:
        page.example.start()
        yield
        await page.example.stop()

    # Not page.launch: variables of the environment could make it share the page, or serve files beside the guard
    plain = fastapi.FastAPI(openapi_url=None, lifespan=opened)
    app = gr.mount_gradio_app(
        plain,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[str(pictures)],  # the guard lets nothing through but the PNG files in it
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        head=f"<style>{stylesheet('tstitch_trt.ui')}</style>",
    )
    guard = guarded(app, events={index: len(event.inputs) for index, event in blocks.fns.items()})
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
