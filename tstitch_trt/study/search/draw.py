"""The samples of a search: drawn chunk by chunk for all candidates together, kept on disk, looked at once.

All candidates share seeds and labels or prompts, and where their trajectories begin alike the beginning is run once
(``tstitch_trt.study.evaluate.shared_prefix``). What was drawn stays: an interrupted search goes on from its last
finished chunk, and a later one with more samples or candidates draws only what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tstitch_engines.bundle.identity import digest
from tstitch_trt.study.evaluate.evaluate import Request
from tstitch_trt.study.evaluate.observations import Observations
from tstitch_trt.study.evaluate.shared_prefix import draw_settings
from tstitch_trt.study.quality import Drawn, Scorer, Seen, join
from tstitch_trt.study.records import Setting
from tstitch_trt.study.search.candidates import Candidate
from tstitch_trt.study.store import weights_of

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["Samples"]

_CHUNK: Final = 64  # samples of a candidate between two saves, about
_PAIRED: Final = ("squared_error", "lpips", "latent_error")


class Samples:
    """What the scorer saw of each candidate's samples so far."""

    def __init__(
        self,
        runtime: Runtime,
        scorer: Scorer,
        request: Request,
        *,
        reference: Setting,
        guided: bool,
        work: Path,
        out_of_time: Callable[[], bool] = lambda: False,
        tick: Callable[[int, str], None],
    ) -> None:
        """``reference``: what paired metrics compare with. ``work``: the folder on disk. ``tick``: after each chunk of
        a candidate, with the number of samples that were added or found."""
        self._runtime = runtime
        self._scorer = scorer
        self._request = request
        self._reference = reference
        self._work = work
        self._out_of_time = out_of_time
        self._tick = tick
        whole = max(1, runtime.batch_limit // (2 if guided else 1))
        self.chunk = whole * max(1, _CHUNK // whole)
        self._made_by = _made_by(runtime, request, self.chunk)

    def fill(self, candidates: Sequence[Candidate], count: int, *, whatever: bool = False) -> bool:
        """Draws what is missing of the first ``count`` samples of each.

        ``False`` when time ran out before, which is not looked at with ``whatever``.
        """
        for start, stop in self._chunks(count):
            if not whatever and self._out_of_time():
                return False
            lacking = {c.key: self._place(c.setting).lacking(start, stop - start) for c in candidates}
            todo = [c.setting for c in candidates if lacking[c.key]]
            for candidate in candidates:
                if not lacking[candidate.key]:
                    self._tick(stop - start, "found")
            if todo:
                self._draw(todo, lacking, start, stop)
        return True

    def seen(self, candidate: Candidate, count: int) -> Seen:
        """Of the first ``count`` samples, which were drawn before."""
        place = self._place(candidate.setting)
        return join([place.seen(start, stop - start) for start, stop in self._chunks(count)])

    def _chunks(self, count: int) -> list[tuple[int, int]]:
        return [(start, min(start + self.chunk, count)) for start in range(0, count, self.chunk)]

    def _draw(self, todo: Sequence[Setting], lacking: dict[str, list[str]], start: int, stop: int) -> None:
        paired = self._scorer.paired
        settings = list(todo)
        if paired:  # drawn first: the others are compared with it
            settings = [self._reference, *(setting for setting in todo if setting != self._reference)]
        names = list(dict.fromkeys(name for setting in settings for name in setting.members))
        wishes = self._request.wishes(self._runtime.manifest, start, stop, names)
        decoding = set(self._scorer.metrics) != {"latent_error"}
        against: Drawn | None = None
        for setting, latents in draw_settings(self._runtime, settings, wishes):
            images = self._runtime.decode(latents) if decoding else None
            if paired and against is None:
                against = Drawn(images, latents)
            missing = lacking.get(digest(setting))
            if not missing:
                continue  # the reference, drawn again for the others
            seen = self._scorer.look(
                images,
                labels=wishes.get("labels"),
                prompts=wishes.get("prompt"),
                latents=latents,
                against=against,
                only=missing,
            )
            self._place(setting).add(start, seen)
            self._tick(stop - start, f"{setting.solver} {setting.steps}: {setting.schedule}")

    def _place(self, setting: Setting) -> Observations:
        folder = self._work / digest({"setting": setting, "made by": self._made_by})[:20]
        wanted = {
            name: digest([source, self._reference]) if name in _PAIRED else source
            for name, source in self._scorer.observed.items()
        }
        return Observations(folder, wanted)


def _made_by(runtime: Runtime, request: Request, chunk: int) -> str:
    """The digest of all that decides a setting's samples beside the setting."""
    engines = {
        name: [record.identity for record in network.engines if record.identity.backend == runtime.backend_name]
        for name, network in runtime.manifest.networks().items()
    }
    return digest(
        {
            "seed": request.seed,
            "prompts": list(request.prompts),
            "weights": weights_of(runtime.manifest),
            "engines": engines,
            "device": runtime.device.name,
            "chunk": chunk,
        }
    )
