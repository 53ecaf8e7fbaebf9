"""Runs as one page that needs nothing else: charts with a read-out, the picture for where scripts are off, and tables.

Names, labels and configuration come from files and peers: all of it is escaped, and the page's policy allows this script and no network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

from swarmtune.plotting.breakdown import CAPTION, PARTS, Bar
from swarmtune.plotting.comparison import Comparison
from swarmtune.plotting.curves import (
    HELD_OUT,
    TRAINING,
    Points,
    RunCurves,
    are_classifiers,
    line_style,
    spread_widely,
    text_of,
)
from swarmtune.plotting.runs import Run, ServerTotals, differing_keys

DASHES = {"-": "", "--": "7 4", ":": "2 3", "-.": "8 3 2 3"}
"""matplotlib's line styles as SVG has them."""


def page_of_runs(shown: Comparison, picture_png: bytes) -> str:
    """The whole page as HTML; ``picture_png`` is what is seen where scripts are off."""
    title = escape(shown.title)
    script, style = _asset("page.js"), _asset("page.css")
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}'"
    parts = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}; base-uri 'none'; form-action 'none'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{title}</h1>",
        _legend(shown.names),
        '<div id="charts"></div>',
        f'<img id="picture" alt="the same as a picture" src="data:image/png;base64,{base64.b64encode(picture_png).decode()}">',
        "<h2>Runs</h2>",
        _runs_table(shown),
        _differences(shown),
        "<h2>Where the time went</h2>",
        _times(shown.bars),
        _servers_table(shown),
        f'<script type="application/json" id="data">{embed_json(_charts(shown))}</script>',
        f"<script>{script}</script>\n</body>\n</html>\n",
    )
    return "\n".join(part for part in parts if part)


def embed_json(value: Any) -> str:
    """JSON that can stand inside a ``script`` element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return resources.files("swarmtune").joinpath("assets", "plot", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- charts ------------------------------------------------------------------------------------------------------------------


def _charts(shown: Comparison) -> dict[str, Any]:
    prefixes = [""] if shown.alone else [f"{name}: " for name in shown.names]
    numbered = list(enumerate(shown.curves))
    charts = [
        {"title": "loss", "unit": "nats per token", "series": [one for index, of in numbered for one in _loss(of, prefixes, index)]},
        _meaning(shown.curves, prefixes),
        {
            "title": "speed",
            "unit": "training tokens/s",
            "zero": True,
            "series": [_series(f"{prefixes[index]}tokens/s", of.tokens_per_s, _style(prefixes, index, TRAINING)) for index, of in numbered],
        },
        {"title": "traffic", "unit": "MB per training step", "zero": True, "series": _traffic(shown.curves, prefixes)},
    ]
    return {"x": shown.scale.label, "runs": len(shown.runs), "charts": charts}


def _meaning_of(curves: Sequence[RunCurves]) -> str:
    """The name of what is shown beside held-out losses."""
    return "accuracy" if are_classifiers(curves) else "perplexity"


def _meaning(curves: Sequence[RunCurves], prefixes: Sequence[str]) -> dict[str, Any]:
    """What held-out losses mean: perplexities, or accuracies of classifiers."""
    name = _meaning_of(curves)
    drawn: list[Points] = [getattr(of, name) for of in curves]
    series = [_series(f"{prefixes[index]}{name}", points, _style(prefixes, index, HELD_OUT), joined=True) for index, points in enumerate(drawn)]
    if name == "accuracy":
        return {"title": "accuracy on held-out texts", "unit": "share of texts", "zero": True, "series": series}
    return {"title": "perplexity on held-out text", "unit": "perplexity", "log": spread_widely(drawn), "series": series}


def _loss(of: RunCurves, prefixes: Sequence[str], index: int) -> list[dict[str, Any]]:
    prefix, alone = prefixes[index], len(prefixes) == 1
    style, held_out = _style(prefixes, index, TRAINING), _style(prefixes, index, HELD_OUT)
    return [
        _series(f"{prefix}training", of.loss, style, faint=True),
        _series(f"{prefix}training, running mean", of.mean_loss, style),
        _series(f"{prefix}held-out", of.val_loss, held_out, joined=alone, dots=not alone),
    ]


def _traffic(curves: Sequence[RunCurves], prefixes: Sequence[str]) -> list[dict[str, Any]]:
    if len(curves) == 1:
        return [_series("up, MB", curves[0].up_mb, line_style(2)), _series("down, MB", curves[0].down_mb, line_style(3))]
    return [_series(f"{prefixes[index]}up and down, MB", of.traffic_mb, line_style(index)) for index, of in enumerate(curves)]


def _style(prefixes: Sequence[str], index: int, alone: str) -> tuple[str, str]:
    return (alone, "-") if len(prefixes) == 1 else line_style(index)


def _series(name: str, points: Points, style: tuple[str, str], **kind: bool) -> dict[str, Any]:
    x, y = points
    return {
        "name": name,
        "colour": style[0],
        "dash": DASHES[style[1]],
        "x": [_short(value) for value in x],
        "y": [_short(value) for value in y],
        **kind,
    }


def _short(value: float) -> float | None:
    """A number with the digits that a read-out needs, ``None`` where it is not finite."""
    return float(f"{value:.8g}") if math.isfinite(value) else None


def _legend(names: Sequence[str]) -> str:
    if len(names) == 1:
        return ""
    keys = (f"<span>{_key(*line_style(index))} {escape(name)}</span>" for index, name in enumerate(names))
    return f'<p class="keys">{" ".join(keys)}</p>'


def _key(colour: str, style: str) -> str:
    line = f'<line x1="0" y1="5" x2="26" y2="5" stroke="{colour}" stroke-width="3" stroke-dasharray="{DASHES[style]}"/>'
    return f'<svg class="key" viewBox="0 0 26 10" aria-hidden="true">{line}</svg>'


# --- tables ------------------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], identity: str, texts: int) -> str:
    """A table whose first ``texts`` columns hold text, the others numbers."""
    head = "".join(f'<th class="text">{escape(name)}</th>' if index < texts else f"<th>{escape(name)}</th>" for index, name in enumerate(header))
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table id="{identity}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _text(value: str) -> str:
    return f'<td class="text">{escape(value)}</td>'


def _number(value: float | None, digits: int = 4) -> str:
    return f"<td>{escape(text_of(value, digits))}</td>"


RUN_COLUMNS = ("run", "state", "steps", "training loss", "held-out loss", "best", "at step", "{meaning} before", "after", "tokens/s")
RUN_TOTALS = ("wall time, s", "training time, s", "up, MB", "down, MB", "retries", "failures")


def _runs_table(shown: Comparison) -> str:
    meaning = _meaning_of(shown.curves)
    columns = [name.format(meaning=meaning) for name in (*RUN_COLUMNS, *RUN_TOTALS)]
    rows = (_run_row(run, name, curves, meaning) for run, name, curves in zip(shown.runs, shown.names, shown.curves, strict=True))
    table = _table(columns, rows, "runs", 2)
    note = (
        "Training loss is the running mean at the last logged step; times and totals are those of that step, without what a last validation cost. "
        "An unfinished run shows the step and the speed that it logged last."
    )
    return f'{table}\n<p class="caption">{note}</p>'


def _run_row(run: Run, name: str, curves: RunCurves, meaning: str) -> list[str]:
    train, val = run.train, run.val
    best = min((place for place in range(len(val.loss)) if math.isfinite(val.loss[place])), key=val.loss.__getitem__, default=None)
    measured: Sequence[float] = getattr(val, meaning)
    digits = 2 if meaning == "perplexity" else 4
    before = measured[0] if len(val.step) and not val.train_rows[0] else None
    after = measured[-1] if len(val.step) and val.train_rows[-1] else None
    failures = [server.failures for server in run.servers if server.failures is not None]
    summary = run.summary or {}
    speed = summary.get("tokens_per_s")
    if not isinstance(speed, int | float):
        speed = train.tokens_per_s[-1] if len(train.step) else None
    steps = summary.get("steps")
    return [
        _text(name),
        _text("finished" if run.finished else "unfinished"),
        _number(steps if isinstance(steps, int) else (train.step[-1] if len(train.step) else None), 0),
        _number(curves.mean_loss[1][-1] if len(train.step) else None),
        _number(val.loss[-1] if len(val.step) else None),
        _number(None if best is None else val.loss[best]),
        _number(None if best is None else val.step[best], 0),
        _number(before, digits),
        _number(after, digits),
        _number(speed, 1),
        _number(run.wall_s, 1),
        _number(run.train_s, 1),
        _number(_mb(run.bytes_up), 1),
        _number(_mb(run.bytes_down), 1),
        _number(run.retries, 0),
        _number(sum(failures) if failures else None, 0),
    ]


def _mb(count: float | None) -> float | None:
    return None if count is None else count / 1e6


def _differences(shown: Comparison) -> str:
    if shown.alone:
        return ""
    differing = differing_keys(shown.runs)
    if not differing:
        return '<p class="caption">The configurations of these runs do not differ.</p>'
    rows = ([_text(name), *(_text(values[index]) for values in differing.values())] for index, name in enumerate(shown.names))
    return "<h2>What differs in the configuration</h2>\n" + _table(("run", *differing), rows, "differences", 1 + len(differing))


def _times(bars: Sequence[Bar]) -> str:
    if not bars:
        return '<p class="caption">Not recorded.</p>'
    longest = max(sum(bar.seconds.values()) for bar in bars) or 1.0
    keys = (
        f'<span><svg class="key" viewBox="0 0 26 10" aria-hidden="true"><rect width="26" height="10" fill="{PARTS[part]}"/></svg> {part}</span>'
        for part in PARTS
    )
    rows = ([_text(bar.label), f"<td>{_bar(bar, longest)}</td>", *(_number(bar.seconds.get(part), 1) for part in PARTS)] for bar in bars)
    header = ("spent by", "", *(f"{part}, s" for part in PARTS))
    return f'<p class="keys">{" ".join(keys)}</p>\n{_table(header, rows, "times", 1)}\n<p class="caption">{escape(CAPTION)}</p>'


def _bar(bar: Bar, longest: float) -> str:
    drawn, left = [], 0.0
    for part, seconds in bar.seconds.items():
        width = 100 * seconds / longest
        drawn.append(f'<rect x="{left:.3f}" width="{width:.3f}" height="10" fill="{PARTS[part]}"><title>{part}: {seconds:,.1f} s</title></rect>')
        left += width
    return f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none">{"".join(drawn)}</svg>'


def _servers_table(shown: Comparison) -> str:
    rows = [_server_row(run, name, server) for run, name in zip(shown.runs, shown.names, strict=True) for server in run.servers]
    header = ("run", "server", "network, s", "queue, s", "compute, s", "calls", "failures", "up, MB", "down, MB")
    return "<h2>Servers</h2>\n" + _table(header, rows, "servers", 2) if rows else ""


def _server_row(run: Run, name: str, server: ServerTotals) -> list[str]:
    seconds = (_number(value, 1) for value in (server.network_s, server.queue_s, server.compute_s))
    counts = (_number(value, 0) for value in (server.calls, server.failures))
    traffic = (_number(_mb(value), 1) for value in (server.bytes_up, server.bytes_down))
    return [_text(name), _text(server.label + _identity(run, server.label)), *seconds, *counts, *traffic]


def _identity(run: Run, label: str) -> str:
    """Peer and blocks of a server, where the summary names them."""
    servers = (run.summary or {}).get("servers")
    facts = servers.get(label) if isinstance(servers, dict) else None
    known = [f"{key} {facts[key]}" for key in ("peer", "span") if key in facts] if isinstance(facts, dict) else []
    return f" ({', '.join(known)})" if known else ""
