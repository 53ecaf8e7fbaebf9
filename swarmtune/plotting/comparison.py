"""Everything that the picture and the page say about some runs, worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarmtune.plotting.breakdown import Bar, bars_of
from swarmtune.plotting.curves import Axis, RunCurves, Scale, choose_scale, curves_of
from swarmtune.plotting.runs import Run, name_runs


@dataclass(frozen=True, slots=True)
class Comparison:
    """Some runs (one or more) with the name and the curves of each, their common x axis, and the bars of where the time went."""

    runs: tuple[Run, ...]
    names: tuple[str, ...]
    scale: Scale
    curves: tuple[RunCurves, ...]
    bars: tuple[Bar, ...]

    @property
    def alone(self) -> bool:
        """Whether it is about one run."""
        return len(self.runs) == 1

    @property
    def title(self) -> str:
        """What it is about."""
        return self.runs[0].title if self.alone else f"{len(self.runs)} runs"


def compare(runs: Sequence[Run], axis: Axis = Axis.STEP) -> Comparison:
    """Put ``runs``, at least one, side by side.

    Raises:
        UsageError: a run did not log what ``axis`` needs.
    """
    scale, names = choose_scale(runs, axis), name_runs(runs)
    return Comparison(tuple(runs), tuple(names), scale, tuple(curves_of(run, scale) for run in runs), tuple(bars_of(runs, names)))
