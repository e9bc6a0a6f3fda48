"""How a denoiser was trained: what it predicts, and with which noise. Statements in, conventions out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast, get_args

import msgspec

from tstitch_engines.bundle.manifest import NoiseScheduleSpec, PredictionType
from tstitch_engines.errors import BadCheckpoint, BadInput, unknown_name

__all__ = [
    "CONVENTION_OPTIONS",
    "FLOW",
    "NOTHING_KNOWN",
    "NO_FLOW",
    "Conventions",
    "Statement",
    "conventions_of",
    "read_options",
    "say",
    "spelled",
]

CONVENTION_OPTIONS: Final[Mapping[str, tuple[type, str]]] = {
    "prediction": (str, "what it predicts, where the checkpoint does not say it or is wrong: eps, v, x0 or flow"),
    "noise": (str, "the betas of its training: KIND or KIND:BETA_START:BETA_END[:STEPS]"),
    "zero_snr": (bool, "whether those betas are rescaled, so that the last timestep has no signal"),
}
# What a KIND alone stands for: DDPM's betas, Stable Diffusion's, and a formula without any
_BETAS: Final = {"linear": (1e-4, 0.02), "scaled-linear": (0.00085, 0.012), "squared-cosine": (1e-4, 0.02)}

FLOW: Final = "flow"
_SPELLINGS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("eps", "epsilon", "noise", "predeps", "prednoise", "noisepred", "epsprediction"), "eps"),
    **dict.fromkeys(("v", "vpred", "predv", "vprediction", "vparameterization"), "v"),
    **dict.fromkeys(("x0", "sample", "xstart", "startx", "predx0", "x0pred", "predxstart"), "x0"),
    **dict.fromkeys(("flow", "velocity", "flowmatching", "flowprediction", "rectifiedflow", "rf"), FLOW),
}
_ALLOWED: Final = ", ".join(get_args(PredictionType))
NO_FLOW: Final = "flow matching is not supported yet: members predict eps, v or x0 under a schedule of betas"

_NAMES: Final = (
    (re.compile(r"(?<![a-zA-Z])v[-_ ]?pred", re.IGNORECASE), "v"),
    (re.compile(r"(?<![a-zA-Z0-9])x0(?![a-zA-Z0-9])"), "x0"),  # SDXL-Lightning in one step
    (re.compile(r"(?<![a-zA-Z])SiT(?![a-z])"), FLOW),
)


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """``None``: not known. ``because``: what says the prediction. ``doubt``: why it is said where that is not known."""

    prediction: PredictionType | None = None
    because: str = ""
    noise: NoiseScheduleSpec | None = None
    zero_snr: bool | None = None
    notes: tuple[str, ...] = ()
    doubt: str | None = None


NOTHING_KNOWN: Final = Conventions()


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What one ``source`` (``its marker tensor v_pred``) says. ``prediction`` may be one that can't be honoured."""

    source: str
    prediction: str | None = None
    noise: NoiseScheduleSpec | None = None
    zero_snr: bool | None = None


def say(option: str, value: str) -> str:
    """How to set a member's ``option``, for hints: for a command line and for a call."""
    return f'say it: --option MEMBER.{option}={value}, in Python options={{"MEMBER.{option}": "{value}"}}'


# --- what the user says


def read_options(options: Mapping[str, Any]) -> Conventions:
    """The conventions among a member's ``options``. Raises ``BadInput``."""
    prediction, noise = options.get("prediction"), options.get("noise")
    if prediction is not None:
        word = spelled(str(prediction))
        if word == FLOW:
            raise BadInput(f"prediction is {prediction!r}, and {NO_FLOW}", hint="leave this member out")
        if word not in get_args(PredictionType):
            raise unknown_name("prediction type", str(prediction), [*get_args(PredictionType), FLOW])
        prediction = word
    zero = options.get("zero_snr")
    return Conventions(
        prediction=cast("PredictionType | None", prediction),
        because="the option prediction",
        noise=None if noise is None else _parse_noise(str(noise)),
        zero_snr=None if zero is None else bool(zero),
    )


def _parse_noise(text: str) -> NoiseScheduleSpec:
    kind, *numbers = text.replace("_", "-").split(":")
    if kind not in _BETAS:
        raise unknown_name("kind of noise", kind, _BETAS, hint="(write e.g. noise=scaled-linear:0.00085:0.012)")
    start, end = _BETAS[kind]
    try:
        if len(numbers) not in (0, 2, 3):
            raise ValueError("it has another number of parts")
        if len(numbers) >= 2:
            start, end = float(numbers[0]), float(numbers[1])
        steps = int(numbers[2]) if len(numbers) == 3 else 1000
        return NoiseScheduleSpec(kind=kind, steps=steps, beta_start=start, beta_end=end)  # type: ignore[arg-type]
    except (ValueError, BadInput) as error:
        reason = error.message if isinstance(error, BadInput) else str(error)
        raise BadInput(
            f"noise is {text!r}; allowed is KIND, or KIND:BETA_START:BETA_END[:STEPS]: {reason}",
            hint="write e.g. noise=scaled-linear:0.00085:0.012 (Stable Diffusion) or noise=linear (DDPM and DiT)",
        ) from None


# --- what follows


def conventions_of(
    name: str,
    stated: Sequence[Statement],
    *,
    said: Conventions,
    implied: Sequence[Statement] = (),
    undecided: str | None = None,
    title: str = "",
    notes: tuple[str, ...] = (),
) -> Conventions:
    """What holds for the checkpoint called ``name``: what the user ``said``, what it ``stated``, what is ``implied``.

    Each counts where those before say nothing. ``undecided``: why nothing can be taken for granted where all are
    silent; ``None`` where the usual conventions stand. ``title``: what the file calls itself. Raises ``BadCheckpoint``
    where that is so, where two of a kind contradict each other, and for a prediction that can't be honoured.
    """
    told = _prediction(name, stated, said, implied, undecided, title)
    noise = said.noise or _one(name, "noise", stated, "scaled-linear:0.00085:0.012")
    zero = said.zero_snr if said.zero_snr is not None else _one(name, "zero_snr", stated, "true")
    if zero and said.zero_snr is None and told.prediction is None:
        source = next(one.source for one in stated if one.zero_snr)
        raise BadCheckpoint(
            f"{name} was trained without any signal at its last timestep, as {source} says, and nothing says that it "
            "predicts v, which such models do",
            hint=say("prediction", "v"),
        )
    if noise is not None and zero is not None:
        noise = msgspec.structs.replace(noise, zero_terminal_snr=zero)
    return replace(told, noise=noise, zero_snr=zero, notes=(*told.notes, *notes))


def _prediction(
    name: str,
    stated: Sequence[Statement],
    said: Conventions,
    implied: Sequence[Statement],
    undecided: str | None,
    title: str,
) -> Conventions:
    if said.prediction is not None:
        return Conventions(prediction=said.prediction, because=said.because)
    for statements in (stated, implied):
        by_value = {one.prediction: one for one in statements if one.prediction is not None}
        if len(by_value) > 1:
            each = " and ".join(f"{value} by {one.source}" for value, one in by_value.items())
            raise BadCheckpoint(
                f"{name} contradicts itself: it predicts {each}",
                hint=say("prediction", next(key for key in (*by_value, "eps") if key in get_args(PredictionType))),
            )
        for value, one in by_value.items():
            if value == FLOW:
                raise BadCheckpoint(
                    f"{name} predicts the velocity of a flow, as {one.source} says, and {NO_FLOW}",
                    hint="give a member that was trained with a schedule of betas; if it was, "
                    f"{say('prediction', 'eps')}",
                )
            if value not in get_args(PredictionType):
                raise BadCheckpoint(
                    f"{name} predicts {value!r}, as {one.source} says; allowed are {_ALLOWED}",
                    hint=f"if it is one of those under another name, {say('prediction', 'eps')}",
                )
            notes = (f"predicts {value}, as {one.source} says",) if statements is implied else ()
            return Conventions(prediction=cast("PredictionType", value), because=one.source, notes=notes)
    likely = "v"
    for pattern, value in _NAMES:
        for what, text, more in (("its name sounds", name, ""), ("its title sounds", title[:200], " else")):
            if pattern.search(text):
                undecided = f"{what} like {value}, and nothing{more} in it says so"
                likely = value if value in get_args(PredictionType) else "v"
    if undecided is not None:
        raise BadCheckpoint(
            f"{name} does not say what it predicts: {undecided}",
            hint=f"{say('prediction', likely)}; or eps in place of {likely}",
        )
    return Conventions()


def _one(name: str, option: str, stated: Sequence[Statement], example: str) -> Any:
    """What the statements say of ``option``. Raises ``BadCheckpoint`` where they contradict each other."""
    found = [(value, one.source) for one in stated if (value := getattr(one, option)) is not None]
    for value, source in found[1:]:
        if value != found[0][0]:
            raise BadCheckpoint(
                f"{name} contradicts itself: {option} is {found[0][0]} by {found[0][1]} and {value} by {source}",
                hint=say(option, example),
            )
    return found[0][0] if found else None


def spelled(text: str) -> str:
    """``Epsilon``, ``v_prediction``... -> eps, v, x0 or flow; others stay as they are."""
    return _SPELLINGS.get(re.sub(r"[^a-z0-9]", "", text.lower()), text)
