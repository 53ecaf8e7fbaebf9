"""The picture of a run's loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from swarmtune.plotting.curves import HELD_OUT, TRAINING, running_mean

Curve = Sequence[tuple[int, float]]
"""Optimizer step and loss."""


def draw_loss_curve(path: Path, train: Curve, val: Curve, title: str) -> None:
    """Write a PNG: training loss as a line with its running mean, held-out loss as points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from swarmtune.plotting.figure import printable

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps = [step for step, _ in train]
        axes.plot(steps, [loss for _, loss in train], color=TRAINING, alpha=0.3, linewidth=1, label="training")
        axes.plot(steps, running_mean([loss for _, loss in train]), color=TRAINING, label="training, running mean")
    if val:
        axes.plot([step for step, _ in val], [loss for _, loss in val], "o-", color=HELD_OUT, label="held-out")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=printable(title))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if train or val:
        axes.legend()
    figure.savefig(path)
