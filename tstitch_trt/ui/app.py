"""The page itself, in Gradio. It works offline: no fonts, scripts or statistics from elsewhere."""

from __future__ import annotations

import html
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tstitch_engines.errors import TStitchError
from tstitch_engines.needs import require
from tstitch_trt.solvers import SOLVERS
from tstitch_trt.study.fractions import draw_fractions
from tstitch_trt.study.gather import gather
from tstitch_trt.ui.draw import kept
from tstitch_trt.ui.pareto import pareto

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["build_page", "import_gradio", "serving", "wait_for_interrupt"]

_BESIDE: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
_MOST_STEPS: Final = 200
_MOST_GUIDANCE: Final = 15.0


def import_gradio(*, temporary: str) -> Any:
    """Gradio with its statistics and version checks off; pictures on their way to the browser lie in ``temporary``.

    Raises ``Unavailable`` where it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read once, on import
    os.environ["GRADIO_TEMP_DIR"] = temporary  # read when a component is made
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    return require("gradio", "the page", extra="ui")


def build_page(gr: Any, runtime: Runtime, path: str, *, temporary: Path) -> Any:
    """The page over a loaded runtime, one request at a time. ``path``: the bundle as it was named; ``temporary``: where
    pictures are kept, below the system's temporary folder."""
    manifest = runtime.manifest
    defaults, conditioning = manifest.defaults, manifest.conditioning
    first, last = runtime.members[0], runtime.members[-1]
    studies = gather(runtime.bundle)
    classes = conditioning.kind == "class"

    def asked(
        what: Any, negative: str, count: float, steps: float, seed: float, guidance: float, solver: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The pictures, and the settings of the plan."""
        pictures: dict[str, Any] = {"labels": [int(what)]} if classes else {"prompt": what}
        if negative:
            pictures["negative_prompt"] = negative
        settings = {"steps": int(steps), "solver": solver, "guidance": float(guidance)}
        return {**pictures, "n": int(count), "seed": int(seed)}, settings

    def drawing(
        fraction: float,
        beside: list[float],
        *request: Any,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Iterator[Any]:
        wanted = sorted({round(float(f), 4) for f in (fraction, *beside)})

        def tell(phase: str, share: float) -> None:
            progress(share, desc=phase)

        with _shown(gr):
            found = []
            for drawn in draw_fractions(runtime, wanted, *asked(*request), tell, each_step=True):
                caption = f"{drawn.fraction:.0%}: {drawn.members}, {drawn.ms:,.0f} ms per image"
                found += [(str(kept(image, temporary)), caption) for image in drawn.images]
                yield found

    def plotted(fraction: float, *request: Any) -> str:
        _, settings = asked(*request)
        with _shown(gr):
            plan = runtime.plan(fraction=float(fraction), **settings)
            return pareto(runtime, studies, path, plan, guidance=settings["guidance"])

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
                    negative = gr.State("")
                else:
                    what = gr.Textbox(value="", label="Prompt", lines=3, elem_id="what")
                    negative = gr.Textbox(value="", label="Negative prompt", elem_id="negative")
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
                    count = gr.Slider(1, 8, value=1, step=1, label="Images per fraction", elem_id="count")
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
        request = [what, negative, count, steps, seed, guidance, solver]
        one = {"concurrency_limit": 1, "concurrency_id": "runtime"}
        go.click(drawing, [fraction, beside, *request], gallery, **one)
        marks = [fraction.change, steps.change, guidance.change, solver.change, page.load]
        for event in marks:
            event(plotted, [fraction, *request], plot, show_progress="hidden", trigger_mode="always_last")
    return page


@contextmanager
def serving(gr: Any, page: Any, *, host: str, port: int) -> Iterator[str]:
    """The page on the network while the block runs; yields its address."""
    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    style = files("tstitch_trt.ui").joinpath("style.css").read_text(encoding="utf-8")
    page.queue(default_concurrency_limit=1, api_open=False)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        theme=theme,
        css=style,
    )
    try:
        yield str(address)
    finally:
        page.close(verbose=False)


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


def wait_for_interrupt() -> None:
    """Returns on Ctrl-C."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return
