"""The picture of a run's loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

Curve = Sequence[tuple[int, float]]
"""Optimizer step and loss."""


def draw_loss_curve(path: Path, train: Curve, val: Curve, title: str) -> None:
    """Write a PNG: training loss as a line with its running mean, held-out loss as points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps = [step for step, _ in train]
        axes.plot(steps, [loss for _, loss in train], color="C0", alpha=0.3, linewidth=1, label="training")
        axes.plot(steps, _running_mean([loss for _, loss in train]), color="C0", label="training, running mean")
    if val:
        axes.plot([step for step, _ in val], [loss for _, loss in val], "o-", color="C1", label="held-out")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if train or val:
        axes.legend()
    figure.savefig(path)


def _running_mean(losses: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start."""
    means, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = decay * total + (1 - decay) * loss, decay * weight + (1 - decay)
        means.append(total / weight)
    return means
