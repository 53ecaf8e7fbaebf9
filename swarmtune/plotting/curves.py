"""What both the picture and the page draw: curves over steps, tokens or time, thinned to what a screen can show."""

from __future__ import annotations

import enum
import math
import operator
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from swarmtune.errors import UsageError
from swarmtune.plotting.runs import METRICS, Run

TRAINING, HELD_OUT = "#0072B2", "#D55E00"
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Told apart with any colour vision, on a light and on a dark ground (Okabe and Ito's set without black and yellow)."""
LINE_STYLES = ("-", "--", ":", "-.")
"""For more runs than colours, in matplotlib's words."""
LOG_FROM_RATIO = 30
"""Perplexities that differ by more than this factor stand on a logarithmic axis."""
MAX_POINTS = 2000
"""More points than this are thinned before drawing."""

Points = tuple[list[float], list[float]]
"""x and y, same length."""


class Axis(enum.Enum):
    """What runs along x."""

    STEP = "step"
    TOKENS = "tokens"
    TIME = "time"


@dataclass(frozen=True, slots=True)
class Scale:
    """The x axis that all curves share: its name and what a stored value is divided by."""

    axis: Axis
    label: str
    divisor: float

    def values(self, rows: object) -> array[float]:
        """The column of ``TrainRows`` or ``ValRows`` that runs along x."""
        column: array[float] = getattr(rows, {Axis.STEP: "step", Axis.TOKENS: "tokens", Axis.TIME: "seconds"}[self.axis])
        return column if self.divisor == 1 else array("d", (value / self.divisor for value in column))


def choose_scale(runs: Sequence[Run], axis: Axis) -> Scale:
    """The x axis for ``runs``.

    Raises:
        UsageError: a run did not log what is needed.
    """
    if axis is Axis.STEP:
        return Scale(axis, "optimizer step", 1)
    for run in runs:
        if run.train_s is None and not (axis is Axis.TOKENS and run.tokens_counted):
            raise UsageError(f"--x {axis.value} needs the column time/train_s, which {run.path / METRICS} does not have; use --x step")
    if axis is Axis.TOKENS:
        return Scale(axis, "training tokens" if all(run.tokens_counted for run in runs) else "training tokens (estimated from speed and time)", 1)
    longest = max(run.train_s or 0.0 for run in runs)
    unit, divisor = time_unit(longest)
    return Scale(axis, f"training time ({unit})", divisor)


def time_unit(longest_s: float) -> tuple[str, float]:
    """The unit in which times up to ``longest_s`` read well, and its seconds."""
    return ("s", 1) if longest_s < 600 else ("min", 60) if longest_s < 3 * 3600 else ("h", 3600)


def line_style(index: int) -> tuple[str, str]:
    """Colour and line style of the ``index``-th of several runs."""
    return RUN_COLOURS[index % len(RUN_COLOURS)], LINE_STYLES[index // len(RUN_COLOURS) % len(LINE_STYLES)]


def spread_widely(drawn: Sequence[Points]) -> bool:
    """Whether positive values differ so much that only a logarithmic axis shows them."""
    values = [value for _, y in drawn for value in y if 0 < value < math.inf]
    return bool(values) and max(values) / min(values) > LOG_FROM_RATIO


def running_mean(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start; a value that is not finite is passed over."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight if weight else math.nan)
    return means


def thin(x: Sequence[float], y: Sequence[float], at_most: int = MAX_POINTS) -> Points:
    """At most ``at_most`` of the points: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(x) <= at_most:
        return list(x), list(y)
    kept: list[int] = []
    stretches = at_most // 2
    for index in range(stretches):
        span = range(index * len(x) // stretches, (index + 1) * len(x) // stretches)
        finite = [place for place in span if math.isfinite(y[place])] or [span.start]
        kept += sorted({min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)})
    return [x[place] for place in kept], [y[place] for place in kept]


def every_nth(x: Sequence[float], y: Sequence[float], at_most: int = MAX_POINTS) -> Points:
    """At most ``at_most`` points, evenly spread, the last among them: for curves that are smooth already."""
    nth = max(1, math.ceil(len(x) / at_most))
    first = (len(x) - 1) % nth
    return list(x[first::nth]), list(y[first::nth])


@dataclass(frozen=True, slots=True)
class RunCurves:
    """The curves of one run, thinned; each is x and y."""

    loss: Points
    mean_loss: Points
    val_loss: Points
    perplexity: Points
    accuracy: Points
    """Of a classifier, instead of a perplexity."""
    tokens_per_s: Points
    up_mb: Points
    down_mb: Points
    traffic_mb: Points
    """Up and down together; megabytes per training step, all three."""


def are_classifiers(curves: Sequence[RunCurves]) -> bool:
    """Whether accuracies are to be shown where perplexities would be: some run has the former, and none the latter."""
    return any(of.accuracy[0] for of in curves) and not any(of.perplexity[0] for of in curves)


def curves_of(run: Run, scale: Scale) -> RunCurves:
    """What is drawn of ``run``."""
    x, val_x = scale.values(run.train), scale.values(run.val)
    return RunCurves(
        loss=thin(x, run.train.loss),
        mean_loss=every_nth(x, running_mean(run.train.loss)),
        val_loss=every_nth(val_x, run.val.loss),
        perplexity=_present(*every_nth(val_x, run.val.perplexity)),
        accuracy=_present(*every_nth(val_x, run.val.accuracy)),
        tokens_per_s=_present(*thin(x, run.train.tokens_per_s)),
        up_mb=_per_step(run, x, run.train.bytes_up),
        down_mb=_per_step(run, x, run.train.bytes_down),
        traffic_mb=_per_step(run, x, array("d", map(operator.add, run.train.bytes_up, run.train.bytes_down))),
    )


def _present(x: list[float], y: list[float]) -> Points:
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if not math.isnan(b)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _per_step(run: Run, x: Sequence[float], totals: Sequence[float]) -> Points:
    """Growth per step of ``totals`` in MB; stretches with a validation are left out, because its traffic is in the totals too."""
    validated = {int(rows) for rows in run.val.train_rows}
    steps = run.train.step
    places = [place for place in range(1, len(totals)) if place not in validated and math.isfinite(totals[place] - totals[place - 1])]
    grown = [(totals[place] - totals[place - 1]) / (steps[place] - steps[place - 1]) / 1e6 for place in places]
    return thin([x[place] for place in places], grown)


def text_of(value: float | None, digits: int = 4) -> str:
    """A number for people, a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.{digits}f}"
