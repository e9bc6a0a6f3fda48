"""Which member comes first, and for how many steps: schedules of equal counts, and the rule that chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Final

import msgspec

from tstitch_engines.errors import BadInput, unknown_name
from tstitch_trt.study.records import OrderTrial

__all__ = [
    "FEW_SEEDS",
    "MEMBER_ORDERS",
    "SHARES",
    "TRIED",
    "Suggestion",
    "choose_order",
    "counted",
    "knee",
    "order_names",
    "order_of",
    "order_text",
    "small_counts",
    "suggest",
]

MEMBER_ORDERS: Final = ("small-first", "large-first", "large-small-large", "small-large-small")
FEW_SEEDS: Final = 5  # with fewer no sign test of two orders can be significant at 5 %
SHARES: Final = (0.25, 0.5)
TRIED: Final = tuple(i / 10 for i in range(1, 10))


class Suggestion(msgspec.Struct, frozen=True, kw_only=True):
    order: str
    schedule: str
    reason: str
    trials: tuple[OrderTrial, ...]


def order_names(order: str, count: int, steps: int, *, small: str, large: str) -> tuple[str, ...]:
    """``count`` steps of ``small`` and the other of ``steps`` of ``large``; an odd one goes to the first half."""
    rest = steps - count
    runs = {
        "small-first": ((small, count), (large, rest)),
        "large-first": ((large, rest), (small, count)),
        "large-small-large": ((large, rest - rest // 2), (small, count), (large, rest // 2)),
        "small-large-small": ((small, count - count // 2), (large, rest), (small, count // 2)),
    }
    if order not in runs:
        raise unknown_name("order", order, MEMBER_ORDERS)
    return tuple(name for name, length in runs[order] for _ in range(length))


def small_counts(shares: Sequence[float], steps: int) -> tuple[int, ...]:
    """The step counts of ``shares``, rounded as in the paper, each once; neither none nor all of ``steps``."""
    return tuple(sorted({round(share * steps) for share in shares} - {0, steps}))


def counted(names: Sequence[str]) -> str:
    """Step counts: ``small:20,large:30``."""
    return ",".join(f"{name}:{len(list(run))}" for name, run in groupby(names))


def order_text(order: str, share: float, *, small: str, large: str) -> str:
    """The same in shares, for any number of steps: ``small:0.4,large``."""
    rest = 1 - share
    return {
        "small-first": f"{small}:{share:.6g},{large}",
        "large-first": f"{large}:{rest:.6g},{small}",
        "large-small-large": f"{large}:{rest / 2:.6g},{small}:{share:.6g},{large}",
        "small-large-small": f"{small}:{share / 2:.6g},{large}:{rest:.6g},{small}",
    }[order]


def choose_order(trials: Sequence[OrderTrial]) -> str:
    """The order whose error is least on average over the shares that all orders were tried at."""
    by_order = {
        order: {trial.share: trial.latent_error for trial in trials if trial.order == order}
        for order in MEMBER_ORDERS
        if any(trial.order == order for trial in trials)
    }
    if not by_order:
        raise BadInput(
            "no schedule of these members could be tried: each has steps too noisy for the small one",
            hint="choose a member that runs on all steps: --reference-member",
        )
    common = set.intersection(*(set(errors) for errors in by_order.values()))
    if not common:
        return max(by_order, key=lambda order: len(by_order[order]))
    return min(by_order, key=lambda order: sum(by_order[order][share] for share in common))


def knee(curve: Sequence[tuple[float, float]], most: float) -> float:
    """The share of ``curve``, (share, error) of the trials, farthest below the straight line from (0, 0) to (1,
    ``most``): up to there a step on the small member adds less error than the average one. 0 where none is below."""
    gains = {share: share - error / most for share, error in curve}
    best = max(gains, key=lambda share: gains[share], default=0.0)
    return best if gains and gains[best] > 0 else 0.0


def suggest(
    alone: OrderTrial | None,
    trials: Sequence[OrderTrial],
    *,
    more: Callable[[str], Sequence[OrderTrial]],
    small: str,
    large: str,
    resolve: Callable[[str], Sequence[str]],
) -> Suggestion:
    """The best order and a schedule in it, at the knee of its error over the share of small steps.

    ``more``: trials of one order over all shares. ``resolve``: the names that a schedule's text stands for.
    """
    order = choose_order(trials)
    curve = more(order)
    every = tuple(dict.fromkeys((*trials, *curve, *([] if alone is None else [alone]))))
    errors = {trial.share: trial for trial in every if trial.order == order}
    if alone is None:  # the line ends where the small member still runs
        end = max(errors)
        most = errors[end].latent_error / end
        whole = f"its error at {end:.0%}, drawn out to all steps"
    else:
        most = alone.latent_error
        whole = f"that of {small!r} alone, {most:.3g}"
    largest = max(trial.share for trial in trials)
    told = ", ".join(f"{trial.order} {trial.latent_error:.3g}" for trial in trials if trial.share == largest)
    ask = "Latents tell how alike the pictures are; tstitch-trt evaluate measures how good they are."
    share = knee([(s, trial.latent_error) for s, trial in errors.items()], most) if most else 1.0
    if most == 0:
        text, reason = small, f"{small!r} alone ends where {large!r} ends: their final latents are equal."
    elif share == 0:
        text, reason = (
            large,
            (
                f"every share of the steps on {small!r} costs more than its share of the error ({whole}), in the best "
                f"order too ({order})."
            ),
        )
    else:
        chosen = errors[share]
        text = order_text(order, share, small=small, large=large)
        text = text if tuple(resolve(text)) == order_of(chosen) else chosen.schedule
        reason = (
            f"{order} is the order with the least error of the final latents (at {largest:.0%} on "
            f"{small!r}: {told}). {share:.0%} is the knee of its curve: the share of the steps is farthest above the "
            f"share of the error there ({chosen.latent_error:.3g}, {chosen.latent_error / most:.0%} of {whole})."
        )
    return Suggestion(order=order, schedule=text, reason=f"{reason} {ask}", trials=every)


def order_of(trial: OrderTrial) -> tuple[str, ...]:
    """One member name per step of a trial."""
    runs = (part.rpartition(":") for part in trial.schedule.split(","))
    return tuple(name for name, _, count in runs for _ in range(int(count)))
