"""The picture of one run, or of several in the same panels."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from swarmtune.plotting.breakdown import CAPTION, PARTS, Bar
from swarmtune.plotting.comparison import Comparison
from swarmtune.plotting.curves import (
    HELD_OUT,
    RUN_COLOURS,
    TRAINING,
    Axis,
    Points,
    RunCurves,
    Scale,
    are_classifiers,
    line_style,
    spread_widely,
    time_unit,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

DPI = 120
BAR_INCHES = 0.26
CURVES_INCHES = 6.6
LEGEND_ROW_INCHES = 0.22
MAX_LABEL_CHARS = 60


def draw_runs(shown: Comparison) -> bytes:
    """A PNG: loss, perplexity, speed, traffic, and where the time went."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    legend_in = 0.0 if shown.alone else LEGEND_ROW_INCHES * math.ceil(len(shown.runs) / 2)
    bars_in, curves_in = 1.5 + BAR_INCHES * len(shown.bars), CURVES_INCHES + legend_in
    figure = Figure(figsize=(11, curves_in + bars_in), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 1, height_ratios=(curves_in, bars_in))
    upper, lower = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    panels = upper.subplots(2, 2).flat
    for panel, draw in zip(panels, (_draw_loss, _draw_meaning, _draw_speed, _draw_traffic), strict=True):
        draw(panel, shown.curves)
        _finish(panel, shown.scale)
    _draw_bars(lower.subplots(), shown.bars)
    upper.suptitle(printable(shown.title))
    if not shown.alone:
        _draw_legend(upper, shown.names)
    return _png(figure)


def printable(text: str) -> str:
    """``text`` as a label that matplotlib shows as it stands: no formulas, no hidden labels, no control characters, not too long."""
    clean = "".join(character if character.isprintable() else "?" for character in text)
    half = MAX_LABEL_CHARS // 2
    clean = clean if len(clean) <= MAX_LABEL_CHARS else f"{clean[:half]}…{clean[-half + 1 :]}"
    return clean.replace("$", r"\$") if not clean.startswith("_") else " " + clean.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _style(index: int) -> dict[str, Any]:
    colour, line = line_style(index)
    return {"color": colour, "linestyle": line}


def _line(panel: Axes, points: Points, **style: Any) -> None:
    """A line; a single point is drawn as one."""
    x, y = points
    panel.plot(x, y, **{"marker": "." if len(x) == 1 else "", **style})


def _draw_loss(panel: Axes, curves: Sequence[RunCurves]) -> None:
    alone = len(curves) == 1
    for index, of in enumerate(curves):
        style: dict[str, Any] = {"color": TRAINING} if alone else _style(index)
        _line(panel, of.loss, **{**style, "alpha": 0.3 if alone else 0.15, "linewidth": 1}, label="training")
        _line(panel, of.mean_loss, **style, linewidth=1.6, label="training, running mean")
        points = HELD_OUT if alone else style["color"]
        panel.plot(*of.val_loss, "o-" if alone else "o", color=points, markersize=4, markeredgecolor="white", markeredgewidth=0.5, label="held-out")
    panel.set(title="loss", ylabel="loss (nats per token)")
    if alone:
        panel.legend(fontsize="small")
    else:
        panel.set_title("loss (points: held-out)")


def _draw_meaning(panel: Axes, curves: Sequence[RunCurves]) -> None:
    """What held-out losses mean: perplexities, or accuracies of classifiers."""
    classifiers = are_classifiers(curves)
    drawn = [of.accuracy if classifiers else of.perplexity for of in curves]
    for index, points in enumerate(drawn):
        _line(panel, points, **({"color": HELD_OUT} if len(curves) == 1 else _style(index)), marker="o", markersize=4)
    if classifiers:
        panel.set(title="accuracy on held-out texts", ylabel="share of texts", ylim=(0, 1.02))
        return
    if spread_widely(drawn):
        panel.set_yscale("log")
    panel.set(title="perplexity on held-out text", ylabel="perplexity")


def _draw_speed(panel: Axes, curves: Sequence[RunCurves]) -> None:
    for index, of in enumerate(curves):
        _line(panel, of.tokens_per_s, **({"color": TRAINING} if len(curves) == 1 else _style(index)), linewidth=1.4)
    panel.set(title="speed", ylabel="training tokens/s")
    _from_zero(panel, [of.tokens_per_s for of in curves])


def _draw_traffic(panel: Axes, curves: Sequence[RunCurves]) -> None:
    drawn = [curves[0].up_mb, curves[0].down_mb] if len(curves) == 1 else [of.traffic_mb for of in curves]
    if len(curves) == 1:
        _line(panel, curves[0].up_mb, color=RUN_COLOURS[2], label="up")
        _line(panel, curves[0].down_mb, color=RUN_COLOURS[3], label="down")
        if curves[0].up_mb[0]:
            panel.legend(fontsize="small")
    else:
        for index, of in enumerate(curves):
            _line(panel, of.traffic_mb, **_style(index))
    panel.set(title="traffic" if len(curves) == 1 else "traffic, up and down together", ylabel="MB per training step")
    _from_zero(panel, drawn)


def _from_zero(panel: Axes, drawn: Sequence[Points]) -> None:
    highest = max((value for _, y in drawn for value in y), default=0.0)
    if highest > 0:
        panel.set_ylim(0, 1.15 * highest)


def _finish(panel: Axes, scale: Scale) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panel.set_xlabel(scale.label)
    if scale.axis is Axis.STEP:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if scale.axis is Axis.TOKENS:
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.grid(alpha=0.3)
    if not any(len(line.get_path()) for line in panel.lines):
        _say(panel, "not recorded")


def _say(panel: Axes, text: str) -> None:
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color="0.5")
    panel.set(xticks=[], yticks=[])


def _draw_bars(panel: Axes, bars: Sequence[Bar]) -> None:
    panel.set_title("where the time went", loc="left")
    if not bars:
        _say(panel, "not recorded")
        return
    unit, divisor = time_unit(max(sum(bar.seconds.values()) for bar in bars))
    for part, colour in PARTS.items():
        rows = [row for row, bar in enumerate(bars) if part in bar.seconds]
        widths = [bars[row].seconds[part] / divisor for row in rows]
        if rows:
            panel.barh(rows, widths, left=[_before(bars[row], part) / divisor for row in rows], color=colour, height=0.7, label=part)
    panel.set_yticks(range(len(bars)), [printable(bar.label) for bar in bars], fontsize="small")
    panel.set_ylim(len(bars) - 0.5, -0.5)
    panel.set_xlabel(f"time since the start of the run ({unit})\n{textwrap.fill(CAPTION, 120)}", fontsize="small")
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.legend(fontsize="small", loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(PARTS), frameon=False)


def _before(bar: Bar, part: str) -> float:
    """The seconds that are stacked before ``part``."""
    names = list(bar.seconds)
    return sum(bar.seconds[name] for name in names[: names.index(part)])


def _draw_legend(figure: SubFigure, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linewidth=2, **_style(index)) for index in range(len(names))]
    columns = 2 if max(map(len, names)) > 30 or len(names) > 8 else 4
    figure.legend(
        handles, [printable(name) for name in names], loc="outside upper center", ncols=min(columns, len(names)), fontsize="small", frameon=False
    )
