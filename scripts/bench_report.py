"""What a measurement leaves: JSON lines, a Markdown table, and a picture; ``keep`` puts the latter two into docs/benchmarks.md."""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"
PANEL_INCHES, BAR_INCHES, DPI = 3.6, 0.28, 110
LOAD_BEFORE = os.getloadavg()[0]
"""Programs that wanted a core in the minute before this one measured anything."""

TURN = "turn"
"""The x axis of what is measured in turns."""
Row = dict[str, Any]
"""``figure`` and ``value``: a line of the table."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing: lines through points by name, or, with numbers by name, bars.

    Attributes:
        log: both axes of lines are logarithmic.
        rule: a thin line at this value, for what local PEFT or nothing at all would be.
    """

    title: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    bars: Mapping[str, float] = field(default_factory=dict)
    x: str = ""
    y: str = ""
    log: bool = False
    rule: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """A measurement.

    Attributes:
        name: the file of the picture, without its end.
        setting: what was measured, for the heading.
    """

    bench: str
    name: str
    setting: str
    rows: Sequence[Row]
    panels: Sequence[Panel] = ()

    @property
    def heading(self) -> str:
        """What, when, which commit and which machine."""
        machine = f"{os.cpu_count()} cores, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
        waits = f", OMP_WAIT_POLICY={policy}" if (policy := os.environ.get("OMP_WAIT_POLICY")) else ""
        return f"{self.setting}: {datetime.date.today()}, commit {commit()}, {machine}{waits}, load before {LOAD_BEFORE:.1f}"

    @property
    def table(self) -> str:
        """Markdown."""
        lines = [f"### {self.heading}", "", "| figure | value |", "|---|---|"]
        return "\n".join([*lines, *(f"| {row['figure']} | {row['value']} |" for row in self.rows), ""])

    def print(self) -> None:
        """One JSON line per figure, then the table."""
        for row in self.rows:
            say(self.bench, **row)
        print(self.table, flush=True)

    def keep(self) -> None:
        """Append the table; the picture belongs to the last table of its name, so it leaves the one before."""
        name = "_".join([self.name, *preloaded()])
        picture = f"![{self.setting}](images/{name}.png)\n\n"
        text = PAGE.read_text(encoding="utf-8")
        if self.panels:
            (IMAGES / f"{name}.png").write_bytes(draw(self.heading, self.panels))
            text = "".join(part for part in text.splitlines(keepends=True) if f"(images/{name}.png)" not in part)
        head, _, rest = self.table.partition("\n\n")
        PAGE.write_text(f"{text.rstrip()}\n\n{head}\n\n{picture if self.panels else ''}{rest}", encoding="utf-8")


def setting(options: argparse.Namespace, *words: str) -> str:
    """The beginning of a heading: the measurement, and what is particular about it."""
    size = [] if options.hidden == 1024 else [f"hidden size {options.hidden}"]
    return ", ".join([options.what, *words, options.dtype, *size, *preloaded()])


def preloaded() -> list[str]:
    """Libraries that stand in for the system's, such as another allocator."""
    return [Path(name).name.partition(".")[0] for name in os.environ.get("LD_PRELOAD", "").split(":") if name]


def say(bench: str, **values: Any) -> None:
    """One JSON line."""
    print(json.dumps({"bench": bench, **values}), flush=True)


def commit() -> str:
    """The commit of this code, and whether it is changed."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    if not head:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain", "-uno", "--", ".", ":!docs"], capture_output=True, check=False).stdout
    return f"{head} with changes" if changed else head


def draw(title: str, panels: Sequence[Panel]) -> bytes:
    """A PNG of all panels, one below the other where they are bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [1.1 + BAR_INCHES * len(panel.bars) if panel.bars else PANEL_INCHES for panel in panels]
    figure = Figure(figsize=(9, sum(heights) + 0.5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        (_draw_bars if panel.bars else _draw_lines)(axis, panel)
        axis.set_title(panel.title, fontsize="medium")
        axis.set(xlabel=panel.x, ylabel=panel.y)
    figure.suptitle(textwrap.fill(title.replace("$", r"\$"), 110), fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_lines(axis: Any, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    from swarmtune.plotting.curves import line_style

    for index, (name, (x, y)) in enumerate(panel.series.items()):
        colour, line = line_style(index)
        axis.plot(x, y, color=colour, linestyle=line, marker="o", markersize=4, label=name)
    if panel.log:
        axis.set(xscale="log", yscale="log")
    else:
        axis.set_ylim(0, 1.1 * max(value for _, y in panel.series.values() for value in y) or 1)
    if panel.x == TURN:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.rule is not None:
        axis.axhline(panel.rule, color="0.5", linewidth=1)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _draw_bars(axis: Any, panel: Panel) -> None:
    from swarmtune.plotting.curves import RUN_COLOURS

    names = list(panel.bars)
    drawn = axis.barh(range(len(names)), list(panel.bars.values()), color=RUN_COLOURS[0], height=0.7)
    axis.bar_label(drawn, fmt="%.4g", padding=3, fontsize="small")
    axis.margins(x=0.12)
    axis.set_yticks(range(len(names)), names, fontsize="small")
    axis.invert_yaxis()
    if panel.rule is not None:
        axis.axvline(panel.rule, color="0.5", linewidth=1)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
