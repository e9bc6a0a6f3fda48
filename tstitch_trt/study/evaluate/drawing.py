"""Draws the samples of many settings together and keeps their features on disk.

All settings share seeds and labels or prompts, and steps that they begin with alike run once (``shared_prefix``). An
interrupted study, or a later one with more samples or settings, draws only what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tstitch_engines.bundle.identity import digest
from tstitch_trt.progress import Phases
from tstitch_trt.study.evaluate.observations import Observations
from tstitch_trt.study.evaluate.shared_prefix import draw_settings
from tstitch_trt.study.image_set import ImageSet
from tstitch_trt.study.quality.scorer import Features, Samples, Scorer, join
from tstitch_trt.study.records import Setting
from tstitch_trt.study.store import weights_of

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["Drawing"]

_CHUNK: Final = 64  # samples of a setting between two saves, about


class Drawing:
    """The samples of settings that are compared with one reference."""

    def __init__(
        self,
        runtime: Runtime,
        scorer: Scorer,
        images: ImageSet,
        *,
        reference: Setting,
        guided: bool,
        work: Path,
        phases: Phases,
        keep_images: bool = False,
    ) -> None:
        """``reference``: what paired metrics compare with. ``guided``: whether any setting has guided steps.

        ``work``: the folder on disk. ``phases`` is ticked once for each sample that is drawn or found.
        ``keep_images``: the pictures are kept beside the features, as ``images``.
        """
        self._runtime = runtime
        self._scorer = scorer
        self._images = images
        self._reference = reference
        self._work = work
        self._phases = phases
        whole = runtime.splitting.most(guided=guided)
        self.chunk = whole * max(1, _CHUNK // whole)
        self._sources = scorer.sources(reference) | ({"images": digest("images")} if keep_images else {})
        self._decodes = keep_images or set(scorer.metrics) != {"latent_error"}
        networks, backend = runtime.manifest.networks(), runtime.backend_name
        self._made_by = {
            "seed": images.seed,
            "prompts": list(images.prompts),
            "weights": weights_of(runtime.manifest),
            "engines": {
                name: [record.identity for record in network.engines if record.identity.backend == backend]
                for name, network in networks.items()
            },
            "device": runtime.device.name,
            "chunk": self.chunk,
        }

    def fill(self, settings: Sequence[Setting], count: int, *, out_of_time: Callable[[], bool] = lambda: False) -> bool:
        """Draws what is missing of the first ``count`` samples of each; ``False`` when time ran out before."""
        for start, stop in self._chunks(count):
            if out_of_time():
                return False
            missing = {digest(s): self._stored(s).missing(start, stop - start) for s in settings}
            todo = [setting for setting in settings if missing[digest(setting)]]
            if found := len(settings) - len(todo):
                self._phases.tick(found * (stop - start), "found")
            if todo:
                self._draw(todo, missing, start, stop)
        return True

    def features(self, setting: Setting, count: int) -> Features:
        """The features of the first ``count`` samples, which ``fill`` drew."""
        stored = self._stored(setting)
        return join([stored.load(start, stop - start) for start, stop in self._chunks(count)])

    def folder(self, setting: Setting) -> Path:
        """Where a setting's features are kept."""
        return self._work / digest({"setting": setting, "made by": self._made_by})[:20]

    def _stored(self, setting: Setting) -> Observations:
        return Observations(self.folder(setting), self._sources)

    def _chunks(self, count: int) -> list[tuple[int, int]]:
        return [(start, min(start + self.chunk, count)) for start in range(0, count, self.chunk)]

    def _draw(self, todo: Sequence[Setting], missing: dict[str, list[str]], start: int, stop: int) -> None:
        runtime, reference = self._runtime, self._reference
        settings = list(todo)
        if self._scorer.paired or reference in todo:  # drawn first: the others are compared with it
            settings = [reference, *(setting for setting in todo if setting != reference)]
        names = dict.fromkeys(name for setting in settings for name in setting.members)
        keywords = self._images.keywords(runtime.manifest, start, stop, names)
        against: Samples | None = None
        for setting, latents in draw_settings(runtime, settings, keywords):
            images = runtime.decode(latents) if self._decodes else None
            if self._scorer.paired and against is None:
                against = Samples(images, latents)
            wanted = missing.get(digest(setting))
            if not wanted:
                continue  # the reference, drawn again for the others
            features = self._scorer.extract(
                images,
                labels=keywords.get("labels"),
                prompts=keywords.get("prompt"),
                latents=latents,
                against=against,
                only=wanted,
            )
            if "images" in wanted:
                assert images is not None
                features["images"] = images
            self._stored(setting).add(start, features)
            self._phases.tick(stop - start, f"{setting.solver} {setting.steps}: {setting.schedule}")
