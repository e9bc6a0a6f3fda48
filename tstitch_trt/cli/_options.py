"""Options that several commands take, each group a record that also does what its options say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from tstitch_engines.checks import shown
from tstitch_engines.errors import BadInput, unknown_name
from tstitch_trt.cli._command import option

if TYPE_CHECKING:
    from tstitch_engines.bundle.bundle import Bundle
    from tstitch_engines.bundle.manifest import Manifest
    from tstitch_engines.child import Limits
    from tstitch_trt.request.options import ImageKeywords
    from tstitch_trt.runtime.runtime import Runtime
    from tstitch_trt.runtime.vae import Tile
    from tstitch_trt.study.quality.network import NetworkOptions
    from tstitch_trt.study.quality.scorer import Scorer

__all__ = [
    "LimitOptions",
    "LoadOptions",
    "PictureOptions",
    "ProfileOptions",
    "PromptsFile",
    "QualityOptions",
    "StepOptions",
    "lora_texts",
    "parse_budgets",
    "rebuild_option",
    "rounding_option",
    "signature_option",
    "threads_option",
    "trust_option",
]

EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def rebuild_option() -> Any:
    return option("Compile again the engines that are missing, damaged or not for this machine.")


def rounding_option(what: str = "") -> Any:
    """``what``: which fractions it is for, where a command has others."""
    return option(f"How{what} fractions become steps: paper, floor, lcm, timestep or timestep-strict. [paper]", "RULE")


def trust_option() -> Any:
    return option("Load engines that may run code (TensorRT, PyTorch) even if this machine did not compile them.")


def signature_option() -> Any:
    return option("Refuse the bundle unless it is signed with this public key; see tstitch-trt sign.", "KEY.pub.pem")


def threads_option(text: str = "CPU threads.") -> Any:
    return option(f"{text} [$OMP_NUM_THREADS, or all cores]", "N", least=0)


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """Limits of the child processes that compile, verify and run networks for metrics."""

    time_limit: str | None = option(
        "End a child process that works longer on one network. [2h to compile, 1h to verify, 10m to measure]",
        "TIME",
    )
    memory_limit: str | None = option("End a child process that holds more memory: 8GiB, 500MB. [what is free]", "SIZE")

    def limits(self) -> Limits:
        from tstitch_engines.child import Limits

        return Limits.of(self.time_limit, self.memory_limit)


@dataclass(frozen=True, kw_only=True)
class LoadOptions(LimitOptions):
    """Where and with what to run."""

    device: str = option("cpu, cuda or cuda:N.", "NAME", default="cpu")
    backend: str | None = option("Backend whose engines to load. [the first that the bundle was built for]", "NAME")
    threads: int | None = threads_option("CPU threads of engines on the CPU.")
    graph: Literal["auto", "step", "segment", "off"] = option(
        "CUDA graphs: record and replay each step, segments of equal steps, or nothing (off).", default="auto"
    )
    max_memory: str | None = option(
        "Refuse to load a bundle that may need more memory: 8GiB, 500MB. [what it needs at once must be free]", "SIZE"
    )
    rebuild: bool = rebuild_option()
    trust: bool = trust_option()
    require_signature: Path | None = signature_option()

    def open(self, bundle: Path) -> Runtime:
        """The runtime; with ``--rebuild`` under a progress bar."""
        import tstitch_trt
        from tstitch_trt.progress import progress_bar

        if not self.rebuild:
            return tstitch_trt.load(bundle, **asdict(self))
        with progress_bar("checking engines", logs=("tstitch_engines", "tstitch_trt")) as bar:
            return tstitch_trt.load(bundle, **asdict(self), progress=bar)


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    profile: Path | None = option(
        "Write where the time goes, as a trace for Perfetto (docs: how-to/profile).", "FILE.json"
    )

    def start(self) -> None:
        """Records until the command ends, however it ends, and then writes the file. Raises ``BadInput``."""
        if self.profile is not None:
            from tstitch_trt.files import require_output

            require_output(self.profile, ".json", option="--profile")
            click.get_current_context().with_resource(_recorded(self.profile))


@contextmanager
def _recorded(path: Path) -> Iterator[None]:
    from tstitch_engines.trace import MOST_SPANS, Trace
    from tstitch_trt.files import write_bytes
    from tstitch_trt.progress import log

    def write(trace: Trace) -> None:
        write_bytes(path, trace.to_json())
        log(f"profile: {path}" + (f" (the first {MOST_SPANS:,} spans)" if trace.dropped else ""))

    with Trace() as trace:
        try:
            yield
        except BaseException:
            try:
                write(trace)
            except OSError as error:  # what the command failed of is the error to show
                log(f"no profile: {path}: {error.strerror}")
            raise
        write(trace)


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Steps, solver and guidance; ``None`` leaves the choice to the bundle."""

    steps: int | None = option("Denoising steps. [bundle's default]", "N", least=1)
    solver: str | None = option(
        "Solver: ddim, ddpm, euler, dpmpp-2m...; an unknown name lists all. [bundle's default]", "NAME"
    )
    guidance: float | None = option("Classifier-free guidance scale; 1 is none. [bundle's default]", "G")


@dataclass(frozen=True, kw_only=True)
class PromptsFile:
    prompts: Path | None = option("A file of prompts, one a line, for text bundles. [made-up prompts]", "FILE")

    def texts(self) -> list[str]:
        from tstitch_trt.files import read_lines

        return [] if self.prompts is None else read_lines(self.prompts, option="--prompts")


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """Real pictures and networks that metrics need."""

    reference: Path | None = option("Real pictures or statistics. [the bundle's own]", "FILE.npz")
    features: Path | None = option("Feature network, ONNX or TorchScript. [the bundle's own]", "FILE")
    features_options: tuple[str, ...] = option(
        "How to call it: size=299, range=0:1, output=NAME, channels=3. May be repeated.",
        "NAME=VALUE",
        "--features-option",
    )
    lpips: Path | None = option("LPIPS network: two batches of pictures to distances.", "FILE")
    clip: Path | None = option("A CLIP model's folder, for bundles that draw from text.", "DIR")

    def network(self) -> NetworkOptions:
        """How to call the feature network. Raises ``BadInput`` for ``--features-option`` that can't be read."""
        from tstitch_trt.cli._parsing import parse_pairs
        from tstitch_trt.study.quality.network import NetworkOptions

        return NetworkOptions.parse(parse_pairs(self.features_options, option="--features-option", value="VALUE"))

    def scorer(
        self, bundle: Bundle, metrics: str | Sequence[str], *, threads: int, limits: Limits, cache: Path | None = None
    ) -> Scorer:
        from tstitch_trt.study.quality.scorer import Scorer

        return Scorer.of(
            bundle, metrics, reference=self.reference, features=self.features, options=self.network(),
            lpips=self.lpips, clip=self.clip, threads=threads, cache=cache, limits=limits,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Texts and pictures to draw from; without one of them the bundle's own size is drawn from noise."""

    prompt: tuple[str, ...] = option("What to draw. May be repeated: the images take the prompts in turn.", "TEXT")
    negative: str | None = option("What not to draw; works with guidance only.", "TEXT")
    prompt_embeds: Path | None = option("Encoded prompts: prompt_embeds, MEMBER.prompt_embeds...", "FILE.npz")
    size: str | None = option("Width and height in pixels. [the bundle's own, or --image's]", "WxH")
    tile: str | None = option("Run the VAE on whole pictures (off) or on tiles of this size. [auto]", "auto|off|PIXELS")
    image: Path | None = option("A picture to start from.", "FILE")
    strength: float | None = option("Share of the steps that run, from --image on. [0.8; 1 with --mask]", "S")
    mask: Path | None = option("Paint only what is white here; keep the rest of --image.", "FILE")
    resize: bool = option("Resize --image, --mask and --control to the size of the result.")
    control: Path | None = option(
        "A picture for the ControlNet (edges, depth...); grey ones of 16 bits or floats keep their precision.", "FILE"
    )
    control_scale: float | None = option("Weight of the ControlNet. [1]", "X")

    def keywords(self, manifest: Manifest) -> ImageKeywords:
        """Keywords of ``Runtime.sample``. Reads the files."""
        from tstitch_trt.cli._parsing import parse_pixels
        from tstitch_trt.images.read import read_control, read_mask, read_picture

        if self.resize and not (self.image or self.mask or self.control):
            raise BadInput("--resize was given without a picture", hint="leave it out, or add --image FILE")
        found: ImageKeywords = {
            "prompt": self.prompt or None,
            "strength": self.strength,
            "control_scale": self.control_scale,
            "negative_prompt": self.negative,
        }
        if self.prompt_embeds is not None:
            found.update(_embeddings(manifest, self.prompt_embeds))
        target = None
        if self.size is not None:
            width, height = parse_pixels(self.size)
            found["width"], found["height"] = width, height
            target = (height, width)
        elif self.resize and self.image is None:
            target = (manifest.latent.height * manifest.decoder.factor, manifest.latent.width * manifest.decoder.factor)
        if self.image is not None:
            grey = manifest.decoder.kind == "pixel" and manifest.latent.channels == 1
            found["image"] = read_picture(
                self.image, channels=1 if grey else 3, size=target, resize=self.resize, what="--image"
            )
            target = found["image"].shape[:2]
        if self.mask is not None:
            found["mask"] = read_mask(self.mask, size=target, resize=self.resize, what="--mask")
        if self.control is not None:
            found["control"] = read_control(self.control, size=target, resize=self.resize, what="--control")
        return found

    def tiles(self) -> Tile:
        """``--tile`` as the keyword of ``Runtime.sample``. Raises ``BadInput``."""
        if self.tile in (None, "auto"):
            return "auto"
        if self.tile == "off":
            return "off"
        if not (self.tile.isascii() and self.tile.isdecimal() and len(self.tile) < 10):
            raise BadInput(
                f"--tile {self.tile[:80]!r}; allowed are auto, off and a number of pixels", hint="e.g. --tile 512"
            )
        return int(self.tile)

    def kept(self) -> dict[str, object]:
        """What is kept beside the pictures: texts and numbers, and the names of the files."""
        names = ("negative", "strength", "control_scale", "image", "mask", "control", "prompt_embeds")
        said = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {name: value.name if isinstance(value, Path) else value for name, value in said.items()}


def _embeddings(manifest: Manifest, path: Path) -> ImageKeywords:
    """Embeddings of a ``.npz``: arrays by name, or by ``MEMBER.NAME`` where the members' differ."""
    from tstitch_trt.files import open_arrays

    try:
        with open_arrays(path) as stored:
            arrays = {name: stored.read(name) for name in stored.names}
    except (OSError, ValueError) as error:
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"is no .npz file: {error}"
        raise BadInput(
            f"--prompt-embeds {path} {problem}", hint="write it with numpy.savez(FILE, prompt_embeds=...)"
        ) from None
    found: dict[str, Any] = {}  # by a name of EMBEDDINGS
    for name, array in arrays.items():
        member, dot, key = name.rpartition(".")
        if key not in EMBEDDINGS:
            raise unknown_name("array", name, EMBEDDINGS, hint=f"(in {path})")
        if dot and member not in manifest.members:
            raise unknown_name("member", member, manifest.members, hint=f"({name!r} in {path})")
        if dot:
            found.setdefault(key, {})[member] = array
        else:
            found[key] = array
    return cast("ImageKeywords", found)


def parse_budgets(text: str | None) -> tuple[float, ...]:
    """``"200,500"`` -> milliseconds. Raises ``BadInput``."""
    from tstitch_trt.runtime.chooser import check_budget

    if text is None:
        return ()
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"--budget-ms {shown(text)} is no number of milliseconds", hint="e.g. --budget-ms 500") from None
    for budget in found:
        check_budget(budget)
    return found


def lora_texts(given: tuple[str, ...]) -> dict[str, str]:
    """``FILE[:WEIGHT],...`` by name, a list of them where a name comes more than once."""
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not (equals and name and file):
            raise BadInput(f"--lora {text!r} is not NAME=FILE[:WEIGHT]", hint="e.g. --lora large=style.safetensors:0.8")
        found.setdefault(name, []).append(file)
    return {name: ",".join(files) for name, files in found.items()}
