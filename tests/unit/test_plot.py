"""Pictures of runs, drawn from files as training writes them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from swarmtune.commands.plot import main
from swarmtune.errors import UsageError
from swarmtune.plotting.comparison import compare
from swarmtune.plotting.curves import MAX_POINTS, Axis, running_mean, thin
from swarmtune.plotting.figure import draw_runs
from swarmtune.plotting.page import embed_json, page_of_runs
from swarmtune.plotting.runs import Run, differing_keys, find_runs, name_runs, read_run
from swarmtune.train.plot import draw_loss_curve
from tests.metrics_files import metric_rows, write_metrics, write_run


class Page(HTMLParser):
    """What a browser would see: elements, the cells of each table, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.raw: list[tuple[str, str]] = []
        self._table: list[list[str]] | None = None
        self._in_cell, self._in_raw = False, ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self._table = self.tables[str(dict(attrs)["id"])] = []
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("th", "td") and self._table is not None:
            self._table[-1].append("")
            self._in_cell = True
        self._in_raw = tag if tag in ("script", "style") else ""
        if self._in_raw:
            self.raw.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self._in_cell = False
        self._in_raw = ""

    def handle_data(self, data: str) -> None:
        if self._in_raw:
            self.raw[-1] = (self.raw[-1][0], self.raw[-1][1] + data)
        elif self._in_cell and self._table is not None:
            self._table[-1][-1] += data

    def records(self, table: str) -> list[dict[str, str]]:
        head, *rows = self.tables[table]
        return [dict(zip(head, row, strict=True)) for row in rows]

    @property
    def data(self) -> Any:
        return json.loads(next(text for tag, text in self.raw if tag == "script"))


def must_read(path: Path) -> Run:
    run = read_run(path)
    assert run is not None
    return run


def page_at(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def page_of(*runs: Run, axis: Axis = Axis.STEP) -> Page:
    return Page(page_of_runs(compare(runs, axis), b""))


def write_rows(path: Path, text: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.csv").write_text(text)
    return path


def test_one_run_gets_a_picture_and_a_page_beside_its_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "run" / name) for name in ("plot.png", "plot.html")]
    with Image.open(tmp_path / "run" / "plot.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 100
    assert {item.name for item in (tmp_path / "run").iterdir()} == {"config.yaml", "metrics.csv", "summary.json", "plot.png", "plot.html"}


def test_several_runs_go_to_the_current_directory_or_where_out_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / "runs" / name, steps=20)
    monkeypatch.chdir(tmp_path)
    main(["runs/a", "runs/b"])
    assert Path("plot.png").is_file()
    assert Path("plot.html").is_file()
    main(["runs", "--out", "new/folder"])
    assert {item.name for item in Path("new/folder").iterdir()} == {"plot.png", "plot.html"}
    main(["runs", "--out", "new/only.png"])
    main(["runs", "--out", "other/only.html"])
    assert Path("new/only.png").is_file()
    assert not Path("new/only.html").exists()
    assert [item.name for item in Path("other").iterdir()] == ["only.html"]


def test_page_asks_nothing_of_the_network_and_allows_its_own_script_only(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    main([str(tmp_path / "a")])
    page = page_at(tmp_path / "a" / "plot.html")
    for _, attributes in page.elements:
        assert not {"href", "srcset", "action", "style", "xlink:href"} & attributes.keys()
        assert (attributes.get("src") or "data:").startswith("data:")
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", "".join(text for _, text in page.raw))
    policy = next(str(attributes["content"]) for tag, attributes in page.elements if tag == "meta" and "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    for tag, text in page.raw[:1] + page.raw[-1:]:
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    picture = next(str(attributes["src"]) for tag, attributes in page.elements if tag == "img")
    with Image.open(io.BytesIO(base64.b64decode(picture.removeprefix("data:image/png;base64,")))) as image:
        image.verify()


def test_accuracies_of_classifiers_stand_where_perplexities_would(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "run", "step,train_loss,val_loss,val_accuracy\n0,,1.6,0.2\n0,1.5,,\n1,1.2,,\n1,,1.1,0.75\n")
    page = page_of(must_read(path))
    assert page.data["charts"][1]["title"] == "accuracy on held-out texts"
    (series,) = page.data["charts"][1]["series"]
    assert (series["name"], series["x"], series["y"]) == ("accuracy", [0, 2], [0.2, 0.75])
    (shown,) = page.records("runs")
    assert (shown["accuracy before"], shown["after"]) == ("0.2000", "0.7500")
    write_run(tmp_path / "other")
    mixed = page_of(must_read(path), must_read(tmp_path / "other"))
    assert mixed.data["charts"][1]["title"] == "perplexity on held-out text"


def test_numbers_of_the_tables_and_charts_are_those_of_the_csv(tmp_path: Path) -> None:
    rows = write_run(tmp_path / "run")
    page = page_of(must_read(tmp_path / "run"))
    train, val = [row for row in rows if "train_loss" in row], [row for row in rows if "val_loss" in row]
    (shown,) = page.records("runs")
    best = min(val, key=lambda row: row["val_loss"])
    assert shown == {
        "run": "run",
        "state": "finished",
        "steps": "200",
        "training loss": f"{running_mean([row['train_loss'] for row in train])[-1]:.4f}",
        "held-out loss": f"{val[-1]['val_loss']:.4f}",
        "best": f"{best['val_loss']:.4f}",
        "at step": f"{best['step'] + 1:.0f}",
        "perplexity before": f"{val[0]['val_ppl']:.2f}",
        "after": f"{val[-1]['val_ppl']:.2f}",
        "tokens/s": "1,861.5",
        "wall time, s": f"{train[-1]['time/wall_s']:.1f}",
        "training time, s": f"{train[-1]['time/train_s']:.1f}",
        "up, MB": f"{train[-1]['bytes_up'] / 1e6:,.1f}",
        "down, MB": f"{train[-1]['bytes_down'] / 1e6:,.1f}",
        "retries": "2",
        "failures": "1",
    }
    last = train[-1]
    for server, label in zip(page.records("servers"), ("blocks0-2.Q1w2e3", "blocks2-4.R4t5y6"), strict=True):
        assert server["server"].startswith(f"{label} (peer peer-")
        for column, name in (("network, s", "network_s"), ("queue, s", "queue_s"), ("compute, s", "compute_s")):
            assert server[column] == f"{last[f'server/{label}/{name}']:.1f}"
        assert server["calls"] == "400"
    loss = page.data["charts"][0]["series"]
    assert loss[0]["x"] == list(range(1, 201))
    assert loss[2]["x"] == [0, 50, 100, 150, 200]
    assert loss[0]["y"] == pytest.approx([row["train_loss"] for row in train])
    assert loss[2]["y"] == pytest.approx([row["val_loss"] for row in val])
    client, *servers = page.records("times")
    assert client["own work, s"] == f"{last['time/train_s'] - last['time/swarm_s']:.1f}"
    assert client["waiting for the swarm, s"] == f"{last['time/swarm_s']:.1f}"
    assert [server["spent by"] for server in servers] == ["blocks0-2.Q1w2e3", "blocks2-4.R4t5y6"]
    assert servers[0][""] == "".join(f"{part}: {servers[0][f'{part}, s']} s" for part in ("network", "queue", "compute"))


def test_traffic_of_a_step_leaves_out_what_validation_moved(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    curves = compare([must_read(tmp_path / "run")]).curves[0]
    assert set(curves.up_mb[1]) == {6.467316}
    assert set(curves.down_mb[1]) == {3.213012}
    assert curves.traffic_mb[1][0] == pytest.approx(6.467316 + 3.213012)


def test_text_from_files_and_peers_stays_text(tmp_path: Path) -> None:
    label = "</script><script>alert(1)</script><img src=x onerror=alert(2)>$x^$_&"
    write_run(tmp_path / "_<b>$a^$ \u4e2d", steps=20, labels=[label])
    write_run(tmp_path / "<i>", steps=20, labels=[label])
    runs = [must_read(path) for path in find_runs([tmp_path])]
    shown = compare(runs)
    page = Page(page_of_runs(shown, draw_runs(shown)))
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert [tag for tag, _ in page.elements].count("img") == 1
    assert not [tag for tag, _ in page.elements if tag in ("b", "i")]
    assert all(server["server"].startswith(f"{label} (") for server in page.records("servers"))
    assert {run["run"] for run in page.records("runs")} == {"_<b>$a^$ \u4e2d", "<i>"}
    Image.open(io.BytesIO(draw_runs(compare(runs[:1])))).verify()


def test_embedded_json_cannot_end_its_element() -> None:
    value = {"</script>": ["<!--", "&lt;", "\u2028"]}
    assert not set("<>&\u2028") & set(embed_json(value))
    assert json.loads(embed_json(value)) == value


def test_unfinished_run_is_drawn_and_says_so(tmp_path: Path) -> None:
    rows = write_run(tmp_path / "run", finished=False)
    run = must_read(tmp_path / "run")
    assert run.title == "lora_bloom on pocket_bloom (unfinished)"
    (shown,) = page_of(run).records("runs")
    assert shown["state"] == "unfinished"
    assert shown["steps"] == "200"
    last = [row for row in rows if "train_loss" in row][-1]
    assert shown["tokens/s"] == f"{last['tokens_per_s']:,.1f}"


def test_a_last_line_that_is_still_being_written_is_left_out_until_the_run_is_finished(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "run", "step,train_loss\n0,4.0\n1,3.5\n2,3.")
    assert list(must_read(path).train.loss) == [4.0, 3.5]
    (path / "summary.json").write_text("{}")
    assert list(must_read(path).train.loss) == [4.0, 3.5, 3.0]


def test_columns_that_are_missing_are_not_drawn_and_nothing_is_made_up(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "run", "step,train_loss\n0,4.0\n1,3.5\n")
    run = must_read(path)
    draw_runs(compare([run]))
    page = page_of(run)
    (shown,) = page.records("runs")
    assert {name for name, value in shown.items() if value != "–"} == {"run", "state", "steps", "training loss"}
    assert "times" not in page.tables
    assert "servers" not in page.tables


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "run", "step,train_loss,val_loss,val_ppl\n0,4.0,,\n1,nan,,\n2,2.0,,\n2,,inf,inf\n3,,2.0,7.4\n")
    run = must_read(path)
    draw_runs(compare([run]))
    page = page_of(run)
    assert page.data["charts"][0]["series"][0]["y"] == [4.0, None, 2.0]
    assert page.records("runs")[0]["best"] == "2.0000"


def test_values_that_are_too_large_to_draw_are_gaps(tmp_path: Path) -> None:
    rows = (
        "step,train_loss,val_loss,val_ppl,tokens_per_s,time/train_s,tokens,bytes_up,bytes_down\n"
        "0,4.0,,,1e300,1,5,1e300,2\n1,1e300,,,3,2,10,3,4\n2,-1e300,,,3,1e300,1e300,1e308,1e308\n2,,1e300,1e308,,,,,\n"
        "3,3.0,,,3,5,30,3,4\n3,,2.0,inf,,,,,\n4,2.0,2.1,7.4,3,6,31,3,4\n"
    )
    run = must_read(write_rows(tmp_path / "run", rows))
    for axis in Axis:
        draw_runs(compare([run], axis))
        page = page_of(run, axis=axis)
        assert page.data["charts"][0]["series"][0]["y"] == [4.0, None, None, 3.0, 2.0]
    assert list(run.train.tokens) == [5, 10, 10, 30, 31]
    assert list(run.train.seconds) == [1, 2, 2, 5, 6]


def test_a_resumed_run_replaces_what_it_does_again(tmp_path: Path) -> None:
    first = ("0,,9,,", "0,4,,1,10", "1,3,,2,10", "1,,8,,", "2,99,,3,10", "3,98,,4,10", "3,,97,,")
    resumed = ("0,,96,,", "2,2,,3,10", "3,1,,4,10", "3,,7,,")
    text = "\n".join(("step,train_loss,val_loss,time/train_s,tokens_per_s", *first, *resumed, ""))
    run = must_read(write_rows(tmp_path / "run", text))
    assert list(run.train.step) == [1, 2, 3, 4]
    assert list(run.train.loss) == [4, 3, 2, 1]
    assert list(run.train.tokens) == [10, 20, 30, 40]
    assert list(run.val.loss) == [9, 8, 7]
    assert list(run.val.step) == [0, 2, 4]
    assert list(run.val.seconds) == [0, 2, 4]


def test_rows_of_one_step_are_put_together(tmp_path: Path) -> None:
    """Totals are logged before the loss or after it, and a validation of the same step may stand before the training or after it."""
    header = "step,train_loss,val_loss,time/train_s,tokens,bytes_up,tokens_per_s"
    rows = (
        "0,,9,,,,",
        "0,,,1,100,1e6,",
        "0,4,,,,,90",
        "1,3,,2,200,3e6,80",
        "2,,,4,300,4e6,",
        "2,2,,,,,70",
        "2,,8,,,,",
        "3,1,,,,,60",
        "3,,,5,400,7e6,",
    )
    run = must_read(write_rows(tmp_path / "run", "\n".join((header, *rows, ""))))
    assert list(run.train.step) == [1, 2, 3, 4]
    assert list(run.train.loss) == [4, 3, 2, 1]
    assert list(run.train.seconds) == [1, 2, 4, 5]
    assert list(run.train.tokens) == [100, 200, 300, 400]
    assert list(run.train.tokens_per_s) == [90, 80, 70, 60]
    assert list(run.train.bytes_up) == [1e6, 3e6, 4e6, 7e6]
    assert list(run.val.seconds) == [0, 4]
    assert list(run.val.train_rows) == [0, 3]


def test_runs_are_named_by_what_differs_between_their_configurations(tmp_path: Path) -> None:
    for name, lr in (("a", 0.001), ("b", 0.01)):
        write_run(tmp_path / name, steps=20, lr=lr, finished=name == "a")
    runs = [must_read(path) for path in find_runs([tmp_path])]
    assert name_runs(runs) == ["optimizer.lr=0.001", "optimizer.lr=0.01 (unfinished)"]
    assert differing_keys(runs) == {"optimizer.lr": ["0.001", "0.01"]}
    page = page_of(*runs)
    assert [run["run"] for run in page.records("runs")] == name_runs(runs)
    assert page.records("differences")[1] == {"run": "optimizer.lr=0.01 (unfinished)", "optimizer.lr": "0.01"}
    assert {one["name"] for one in page.data["charts"][1]["series"]} == {f"{name}: perplexity" for name in name_runs(runs)}
    owners = [f"{name}: {whose}" for name in name_runs(runs) for whose in ("client", "2 servers")]
    assert [bar["spent by"] for bar in page.records("times")] == owners


def test_runs_that_do_not_differ_are_named_by_their_directories(tmp_path: Path) -> None:
    for name in ("x/one", "x/two", "y/one"):
        write_run(tmp_path / name, steps=20)
    assert name_runs([must_read(tmp_path / name) for name in ("x/one", "x/two")]) == ["one", "two"]
    names = name_runs([must_read(tmp_path / name) for name in ("x/one", "x/two", "y/one")])
    assert names[1] == "two"
    assert len(set(names)) == 3


def test_a_sweep_directory_means_its_runs_in_the_order_of_their_numbers_each_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run-10", "run-9", "run-1"):
        write_run(tmp_path / "sweep" / name, steps=10)
    write_rows(tmp_path / "sweep" / "run-2", "")
    found = find_runs([tmp_path / "sweep", tmp_path / "sweep" / "run-9"])
    assert [path.name for path in found] == ["run-1", "run-2", "run-9", "run-10"]
    main([str(tmp_path / "sweep"), "--out", str(tmp_path)])
    assert "left out" in capsys.readouterr().err
    assert len(page_at(tmp_path / "plot.html").records("runs")) == 3


def test_x_can_be_steps_tokens_or_time(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=20)
    run = must_read(tmp_path / "run")
    by_time = page_of(run, axis=Axis.TIME).data
    assert by_time["x"] == "training time (s)"
    assert by_time["charts"][0]["series"][0]["x"] == pytest.approx(list(run.train.seconds))
    by_tokens = page_of(run, axis=Axis.TOKENS).data
    assert "estimated" in by_tokens["x"]
    assert by_tokens["charts"][0]["series"][0]["x"] == pytest.approx([1024 * (step + 1) for step in range(20)])
    counted = [row | {"tokens": 7.0 * row["step"]} for row in metric_rows(20, [])]
    (tmp_path / "counted").mkdir()
    write_metrics(tmp_path / "counted" / "metrics.csv", counted)
    exact = page_of(must_read(tmp_path / "counted"), axis=Axis.TOKENS).data
    assert exact["x"] == "training tokens"
    assert exact["charts"][0]["series"][0]["x"] == [7 * step for step in range(20)]
    draw_runs(compare([run], Axis.TIME))
    draw_runs(compare([run], Axis.TOKENS))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing to draw yet"),
        ("step,train_loss\n", "nothing to draw yet"),
        ("a,b\n1,2\n", "its header needs step and train_loss or val_loss, got 'a,b'"),
        ("step,train_loss\n0,4.0\n1,four\n", "line 3, column train_loss: expected a number, got 'four'"),
        ("step,train_loss,time/train_s\n0,4.0,soon\n", "line 2, column time/train_s: expected a number, got 'soon'"),
        ("step,train_loss,server/a/network_s\n0,4.0,1\n1,3,x\n", "line 3, column server/a/network_s: expected a number, got 'x'"),
        ("step,train_loss\n0,4.0\n1,3.0,5\n", "line 3: the header has 2 columns, this row has 3"),
        ("step,train_loss\n,4.0\n", "line 2: the column step is empty"),
        ("step,train_loss\n1e300,4.0\n", "line 2, column step: expected the number of a step, got '1e300'"),
        ("step,step,train_loss\n0,0,4.0\n", "a column occurs twice"),
        ("step,train_loss\n0,\x00\n", "column train_loss: expected a number|cannot be read as CSV"),
    ],
)
def test_metrics_that_cannot_be_drawn_are_refused_in_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = write_rows(tmp_path / "run", text)
    with pytest.raises(UsageError, match=said) as caught:
        main([str(path)])
    assert "\n" not in str(caught.value)
    assert [item.name for item in path.iterdir()] == ["metrics.csv"]


def test_words_that_name_no_run_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=5)
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("recipe: x\n")
    write_rows(tmp_path / "bare", "step,train_loss\n0,1\n")
    refused = {
        ("nowhere",): "is not a run directory: there is nothing of this name",
        ("run/metrics.csv",): "is not a run directory: there is a file of this name",
        ("empty",): "neither it nor a directory in it has a metrics.csv",
        ("begun",): "has no metrics.csv yet",
        ("bare", "--x", "time"): "--x time needs the column time/train_s",
        ("run", "--x", "weeks"): "invalid choice: 'weeks'",
        ("run", "--out", "plot.svg"): "ends in .png or .html, got",
        ("run", "--out", "run/metrics.csv/deep"): "cannot be made",
        (): "the following arguments are required",
    }
    for words, said in refused.items():
        places = [str(tmp_path / word) if "--" not in word and word not in ("time", "weeks") else word for word in words]
        with pytest.raises(UsageError, match=re.escape(said)) as caught:
            main(places)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "text"), [("config.yaml", "a: [1"), ("config.yaml", "- 1"), ("summary.json", "{"), ("summary.json", "[]")])
def test_a_broken_file_beside_the_metrics_is_named(tmp_path: Path, name: str, text: str) -> None:
    write_run(tmp_path / "run", steps=5)
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(UsageError, match=re.escape(name)):
        main([str(tmp_path / "run")])


def test_an_output_that_cannot_be_written_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=5)
    (tmp_path / "out" / "plot.png").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"plot\.png cannot be written"):
        main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["plot.png"]


def test_a_long_run_is_thinned_and_its_spike_is_kept(tmp_path: Path) -> None:
    steps = 100_000
    lines = (f"{step},{99 if step == 54_321 else 2 + step % 7},{1000 + step % 3}\n" for step in range(steps))
    path = write_rows(tmp_path / "run", "step,train_loss,tokens_per_s\n" + "".join(lines))
    run = must_read(path)
    assert len(run.train.step) == steps
    main([str(path)])
    series = page_at(path / "plot.html").data["charts"][0]["series"]
    assert all(len(one["x"]) <= MAX_POINTS for one in series)
    assert (54_322, 99) in zip(series[0]["x"], series[0]["y"], strict=True)
    assert series[1]["x"][-1] == steps
    assert (path / "plot.html").stat().st_size < 2_000_000


def test_thinning_keeps_order_extremes_and_gaps() -> None:
    x = list(range(5000))
    y = [math.nan if value < 100 else math.sin(value / 50) for value in x]
    thin_x, thin_y = thin(x, y, 200)
    assert thin_x == sorted(thin_x)
    assert len(thin_x) <= 200
    assert max(value for value in thin_y if value == value) == max(value for value in y if value == value)
    assert math.isnan(thin_y[0])


def test_many_servers_share_a_bar_and_lose_no_second(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=20, labels=[f"s{index}" for index in range(40)])
    run = must_read(tmp_path / "run")
    shown = compare([run])
    assert len(shown.bars) == 17
    assert shown.bars[-1].label == "25 other servers"
    assert sum(sum(bar.seconds.values()) for bar in shown.bars[1:]) == pytest.approx(sum(server.seconds for server in run.servers))
    draw_runs(shown)


def test_more_runs_than_colours_are_told_apart(tmp_path: Path) -> None:
    for index in range(14):
        write_run(tmp_path / f"run{index}", steps=6, lr=0.001 * (index + 1))
    shown = compare([must_read(path) for path in find_runs([tmp_path])])
    draw_runs(shown)
    series = page_of(*shown.runs).data["charts"][1]["series"]
    assert len({(one["colour"], one["dash"]) for one in series}) == 14


def test_plotting_loads_neither_torch_nor_lightning_and_help_not_even_matplotlib(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=5)
    code = (
        "import sys, swarmtune.commands.plot as plot\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plot.main([sys.argv[1]])\n"
        "assert 'matplotlib' in sys.modules\n"
        "assert not {'torch', 'lightning', 'pandas', 'hydra', 'matplotlib.pyplot'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_loss_curve_of_a_run_is_a_picture_with_and_without_values(tmp_path: Path) -> None:
    draw_loss_curve(tmp_path / "a.png", [(1, 4.0), (2, 3.5)], [(0, 4.1), (2, 3.4)], "$recipe$ on m_1")
    draw_loss_curve(tmp_path / "b.png", [], [], "empty")
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (840, 480)
