"""Reading, splitting, packing, keeping and streaming of text."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from swarmtune.app import check_data, train
from swarmtune.config import load_config
from swarmtune.errors import UsageError
from swarmtune.train import sources
from swarmtune.train.cache import TokenCache, default_folder
from swarmtune.train.data import TextDataModule
from swarmtune.train.documents import SHARED_PARAGRAPH_CHARS, Document, held_out, python_topics
from swarmtune.train.forms import TextForm
from swarmtune.train.preparing import Preparing
from swarmtune.train.rows import TextRows
from swarmtune.train.sources import DatasetSource
from swarmtune.train.windows import IGNORED_LABEL, Windows, cut, pack

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

TEXTS = [f"document {index} " * (index + 1) for index in range(20)]
ROWS = "".join(json.dumps({"body": text, "number": index}) + "\n" for index, text in enumerate(TEXTS))
POCKET = str(Path(__file__).parents[2] / "swarmtune" / "assets" / "pocket_bloom")


# --- splitting ---------------------------------------------------------------------------------------------------------------


def split(items: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    sizes: dict[bytes, int] = {}
    for item in items:
        sizes[item.digest] = sizes.get(item.digest, 0) + len(item.text)
    held = held_out(sizes, fraction)
    return [item for item in items if item.digest not in held], [item for item in items if item.digest in held]


def documents(*texts: str) -> list[Document]:
    return [Document(text, text) for text in texts]


def long_paragraphs(items: list[Document]) -> set[str]:
    paragraphs = (" ".join(paragraph.split()) for item in items for paragraph in item.text.split("\n\n"))
    return {paragraph for paragraph in paragraphs if len(paragraph) >= SHARED_PARAGRAPH_CHARS}


def test_held_out_topics_share_no_paragraph_with_training_topics() -> None:
    train, val = split(python_topics(), 0.15)
    assert not long_paragraphs(train) & long_paragraphs(val)
    assert len(train) + len(val) == len(python_topics())
    share = sum(len(item.text) for item in val) / sum(len(item.text) for item in [*train, *val])
    assert 0.1 < share <= 0.15


def test_the_split_depends_on_the_texts_alone() -> None:
    _, val = split(documents(*TEXTS), 0.3)
    _, other_order = split(documents(*reversed(TEXTS)), 0.3)
    assert {item.text for item in val} == {item.text for item in other_order}


def test_equal_documents_are_never_parted() -> None:
    train, val = split(documents(*TEXTS, *TEXTS), 0.3)
    assert not {item.text for item in train} & {item.text for item in val}
    assert len(train) + len(val) == 40


def test_both_sides_get_a_document_even_of_two() -> None:
    train, val = split(documents("a", "b" * 100), 0.01)
    assert [item.text for item in train] == ["b" * 100]
    assert [item.text for item in val] == ["a"]


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(UsageError, match="at least two different documents"):
        split(documents("a", "a"), 0.5)


# --- packing -----------------------------------------------------------------------------------------------------------------


def column(windows: Windows, name: str) -> list[list[int]]:
    return [windows[index][name].tolist() for index in range(len(windows))]


def test_packing_keeps_every_token_in_order_and_masks_the_rest() -> None:
    windows = Windows(pack([[1, 2, 3], [4, 5], [6, 7]], end=9), length=4, pad=0)
    assert column(windows, "input_ids") == [[1, 2, 3, 9], [4, 5, 9, 6], [7, 9, 0, 0]]
    assert column(windows, "attention_mask") == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert column(windows, "labels") == [[1, 2, 3, 9], [4, 5, 9, 6], [7, 9, IGNORED_LABEL, IGNORED_LABEL]]
    assert {tensor.dtype for tensor in windows[2].values()} == {torch.int64}


def test_a_last_token_alone_in_its_window_is_dropped() -> None:
    assert column(Windows(pack([[1, 2, 3, 4, 5]], None), length=4, pad=0), "input_ids") == [[1, 2, 3, 4]]
    assert len(Windows(pack([[1]], None), length=4, pad=0)) == 0
    assert len(Windows(pack([[1] * 12], None), length=4, pad=0, limit=2)) == 2


@pytest.mark.parametrize("tokens", [[[1, 2, 3], [4, 5], [6, 7]], [[1, 2, 3, 4, 5]], [list(range(30))], [[1]], []])
def test_a_stream_is_cut_as_prepared_tokens_are(tokens: list[list[int]]) -> None:
    whole = Windows(pack(tokens, None), length=4, pad=0).tokens_M
    assert [token for piece in cut(tokens, 4, None) for token in piece.tolist()] == whole.tolist()


# --- reading -----------------------------------------------------------------------------------------------------------------


def read(path: Path | str, column: str = "body", **options: Any) -> list[str]:
    return [item.text for item in source_of(path, column, **options).documents()]


def source_of(path: Path | str, column: str = "text", template: str | None = None, **options: Any) -> DatasetSource:
    return DatasetSource(str(path), TextRows(column, template), **options)


def write(folder: Path, kind: str) -> Path:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"body": TEXTS, "number": list(range(20))})
    path = folder / f"data.{kind}"
    if kind == "saved":
        rows.save_to_disk(path)
    elif kind == "splits":
        datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(path)
    elif kind == "directory":
        path.mkdir()
        (path / "train.jsonl").write_text(ROWS)
        (path / "test.jsonl").write_text(ROWS.splitlines()[0])
    elif kind == "pattern":
        lines = ROWS.splitlines(keepends=True)
        (folder / "part 1.jsonl").write_text("".join(lines[:7]))
        (folder / "part 2.jsonl").write_text("".join(lines[7:]))
        return folder / "part *.jsonl"
    elif kind == "json":
        path.write_text(json.dumps([json.loads(row) for row in ROWS.splitlines()]))
    elif kind == "jsonl":
        path.write_text(ROWS)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(ROWS.encode()))
    elif kind == "jsonl.bz2":
        path.write_bytes(bz2.compress(ROWS.encode()))
    elif kind == "jsonl.xz":
        path.write_bytes(lzma.compress(ROWS.encode()))
    elif kind == "tsv":
        rows.to_csv(path, sep="\t")
    elif kind == "arrow":
        with datasets.arrow_writer.ArrowWriter(path=str(path), features=rows.features) as writer:
            writer.write_table(rows.data.table)
            writer.finalize()
    else:
        getattr(rows, f"to_{kind}")(path)
    return path


KINDS = ["json", "jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "csv", "tsv", "parquet", "arrow", "saved", "splits", "directory", "pattern"]


@pytest.mark.parametrize("kind", KINDS)
def test_local_data_of_every_layout_is_read_and_has_an_identity(kind: str, tmp_path: Path) -> None:
    source = source_of(write(tmp_path, kind), "body")
    source.check()
    assert [item.text for item in source.documents()] == TEXTS
    assert source.digest(lambda _: None) == source.digest(lambda _: None) != source_of(source.path, "number").digest(lambda _: None)
    if kind in ("splits", "directory"):
        assert read(source.path, split="test") == TEXTS[:1]


def test_a_directory_with_a_card_has_the_configurations_and_splits_that_it_says(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: a.jsonl\n  - split: test\n    path: b.jsonl\n"
        "- config_name: fr\n  data_files: c.jsonl\n---\n"
    )
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"body": name}) + "\n")
    assert read(tmp_path, name="en") == ["a"]
    assert read(tmp_path, name="en", split="test") == ["b"]
    assert read(tmp_path, name="fr") == ["c"]
    for options, sentence in [({}, "Config name is missing"), ({"name": "de"}, "'de' not found"), ({"name": "en", "split": "dev"}, "Bad split: dev")]:
        with pytest.raises(UsageError, match=sentence):
            source_of(tmp_path, "body", **options).check()


def test_a_text_file_is_read_by_paragraph_alone_and_in_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "notes (1), [a].txt"
    path.write_text("one\ntwo\n\nthree\n")
    for place in (path, tmp_path):
        assert [text.strip() for text in read(place, "text")] == ["one\ntwo", "three"]


def test_texts_that_look_like_missing_values_are_texts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n\nnull,1\nNA,2\n,3\nword,4\n")
    assert read(tmp_path / "a.csv", "text") == ["null", "NA", "word"]


def test_a_template_makes_a_text_of_several_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "one?", "a a": 1}\n{"q": "two?", "a a": null}\n{"q": "{a a}", "a a": 2}\n')
    assert read(tmp_path / "a.jsonl", template="{{{q}}} -> {a a}") == ["{one?} -> 1", "{{a a}} -> 2"]
    with pytest.raises(UsageError, match=r"no column 'z'; there are: q, a a \(set data\.text_template\)"):
        read(tmp_path / "a.jsonl", template="{z}")


def test_wrong_data_is_one_sentence_before_anything_is_prepared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved, lines, csv = write(tmp_path, "splits"), write(tmp_path, "jsonl"), write(tmp_path, "csv")
    (tmp_path / "strange.bin").write_text("x")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.csv").write_text("text\nx\n")
    (tmp_path / "mixed" / "b.txt").write_text("x")
    (tmp_path / "void").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "fake.jsonl.gz").write_text(ROWS)
    (tmp_path / "fake.parquet").write_text(ROWS)
    for options, sentence in [
        ({"path": lines, "column": "text"}, f"data {lines}: there is no column 'text'; there are: body, number (set data.text_column)"),
        ({"path": csv, "column": "text"}, f"data {csv}: there is no column 'text'; there are: body, number (set data.text_column)"),
        ({"path": saved, "split": "nope"}, "there is no split 'nope'; there are: train, test (choose with data.split)"),
        ({"path": write(tmp_path, "directory"), "split": "nope"}, "there is no split 'nope'; there are: train, test (choose with data.split)"),
        ({"path": lines, "split": "test"}, "a file has no splits, so there is no 'test' in it; leave data.split out"),
        ({"path": lines, "name": "x"}, "data.name=x is for hub ids and directories; leave it out"),
        ({"path": lines, "revision": "x"}, "data.revision=x is for hub ids; leave it out"),
        ({"path": csv, "column": "number"}, "column 'number' holds int, not text"),
        ({"path": tmp_path / "strange.bin"}, "a file must end in one of .json, "),
        ({"path": tmp_path / "mixed"}, "files of one kind are needed, got .csv and .txt; name some of them, such as '*.csv'"),
        ({"path": tmp_path / "void"}, "no file here ends in one of .json, "),
        ({"path": tmp_path / "empty.jsonl"}, "the file is empty"),
        ({"path": tmp_path / "gone.jsonl"}, "no such file or directory"),
        ({"path": tmp_path / "broken.json"}, "broken.json: "),
        ({"path": tmp_path / "fake.jsonl.gz"}, "fake.jsonl.gz: "),
        ({"path": tmp_path / "fake.parquet"}, "fake.parquet: "),
    ]:
        source = source_of(**{"column": "body", **options})
        with pytest.raises(UsageError) as caught:
            source.check()
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not caplog.records


def test_a_row_that_breaks_a_file_late_is_one_sentence_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(ROWS + "{bad\n" + ROWS)
    with pytest.raises(UsageError, match="row 20") as caught:
        read(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n{"body": 5}\n')
    with pytest.raises(UsageError, match="holds int, not text"):
        read(tmp_path / "b.jsonl")


def test_a_file_without_the_column_among_others_is_not_left_out_silently(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("body\nx\n")
    (tmp_path / "b.csv").write_text("bdy\ny\n")
    for look in (lambda: read(tmp_path / "*.csv"), source_of(tmp_path / "*.csv", "body").check, lambda: read(tmp_path)):
        with pytest.raises(UsageError, match=r"there is no column 'body'; there are: bdy"):
            look()


def test_a_hub_id_that_nobody_answers_for_fails_in_seconds_with_one_sentence() -> None:
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"^data org/typo: there is no such path here, and the hub did not answer") as caught:
        DatasetSource("org/typo").check()
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 10


# --- preparing and keeping ---------------------------------------------------------------------------------------------------


def module(path: Path, **options: Any) -> TextDataModule:
    keys = {"source": "dataset", "path": str(path), "text_column": "body", "sequence_length": 16, "batch_size": 4}
    return TextDataModule(POCKET, **{**keys, **options})


def tokens(data: TextDataModule) -> dict[str, list[int]]:
    return {name: windows.tokens_M.tolist() for name, windows in data.windows.items()}


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every time that rows are read, the path of what is read."""
    found: list[str] = []
    original = DatasetSource.documents

    def documents(self: DatasetSource, warn: bool = False) -> Iterator[Document]:
        found.append(self.path)
        return original(self)

    monkeypatch.setattr(DatasetSource, "documents", documents)
    return found


def test_the_same_data_is_read_once_and_other_data_again(tmp_path: Path, readings: list[str]) -> None:
    path, keep = write(tmp_path, "jsonl"), str(tmp_path / "cache")
    first = tokens(module(path, cache_dir=keep))
    assert first == tokens(module(path, cache=False))
    readings.clear()
    assert tokens(module(path, cache_dir=keep)) == first
    assert tokens(module(path, cache_dir=keep, seed=3, batch_size=2)) == first
    longer = module(path, cache_dir=keep, sequence_length=64)
    assert len(longer.windows["train"]) < len(first["train"]) / 32
    assert not readings
    assert tokens(module(path, cache_dir=keep, validation_fraction=0.5)) != first
    path.write_text(ROWS.replace("document 3", "documint 3"))
    assert tokens(module(path, cache_dir=keep)) != first
    assert len(readings) == 4


def test_a_damaged_entry_is_made_anew_with_a_warning(tmp_path: Path, readings: list[str], caplog: pytest.LogCaptureFixture) -> None:
    path, keep = write(tmp_path, "jsonl"), tmp_path / "cache"
    first = tokens(module(path, cache_dir=str(keep)))
    (entry,) = (keep / "tokens").iterdir()
    whole = entry.read_bytes()
    for damage in (whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], whole[: len(whole) // 2], b"", b"x" * 50):
        entry.write_bytes(damage)
        readings.clear()
        caplog.clear()
        assert tokens(module(path, cache_dir=str(keep))) == first
        assert readings
        assert "made anew" in caplog.text
    readings.clear()
    assert tokens(module(path, cache_dir=str(keep))) == first
    assert not readings
    assert [item.name for item in (keep / "tokens").iterdir()] == [entry.name]


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    path = write(tmp_path, "jsonl")
    with caplog.at_level(logging.WARNING):
        assert tokens(module(path, cache_dir=str(tmp_path / "file"))) == tokens(module(path, cache=False))
    assert "cannot be kept" in caplog.text


def test_a_key_is_never_another_entry(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path)
    cache.save("a", {"train": torch.arange(5, dtype=torch.int32), "val": torch.empty(0, dtype=torch.int32)})
    found = cache.load("a")
    assert found is not None
    assert found["train"].tolist() == [0, 1, 2, 3, 4]
    assert cache.load("b") is None


def test_the_default_place_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_folder() == Path("/x/swarmtune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "swarmtune"


@pytest.mark.parametrize("streams", [1, 2])
def test_rows_without_text_are_left_out_with_one_warning(streams: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(ROWS + '{"body": null, "number": 1}\n' * 6 + '{"body": "  ", "number": 2}\n' * 3)
    apart = {"validation_path": str(path)} if streams == 2 else {}
    TextDataModule(POCKET, source="files", path=str(path), text_column="body", cache=False, **apart).setup()
    said = [record.getMessage() for record in caplog.records if "no text" in record.getMessage()]
    assert said == [f"9 of {len(TEXTS) + 9} rows of {path} have no text in column body: left out"] * streams


def test_gaps_between_paragraphs_are_no_rows_without_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "some.txt").write_text("\n\n\n \n\n\n\n\n".join(TEXTS) + "\n\n\n\n")
    TextDataModule(POCKET, source="files", path=str(tmp_path / "some.txt"), cache=False).setup()
    assert not caplog.records


def test_validation_text_may_come_from_another_split_or_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = tmp_path / "other.csv"
    other.write_text("body\nsome other text to look at\n")
    from_file = module(write(tmp_path, "jsonl"), validation_path=str(other))
    assert not caplog.records
    from_split = module(write(tmp_path, "splits"), validation_split="test")
    assert tokens(from_file)["train"] == tokens(from_split)["train"]
    assert "1 of 1 validation documents stand in the training text too" in caplog.text
    assert 0 < len(tokens(from_file)["val"]) < len(tokens(from_file)["train"])
    assert len(module(write(tmp_path, "jsonl"), validation_fraction=0.5, validation_windows=2).windows["val"]) == 2


def test_validation_batches_take_no_random_number(tmp_path: Path) -> None:
    loader, before = module(write(tmp_path, "jsonl"), cache=False).val_dataloader(), torch.get_rng_state()
    assert len(list(loader)) > 0
    assert torch.equal(before, torch.get_rng_state())


def test_a_fingerprint_is_that_of_the_training_windows(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    prints = {
        module(path).fingerprint(),
        module(path, seed=1, batch_size=2).fingerprint(),
        module(write(tmp_path, "parquet")).fingerprint(),
    }
    assert len(prints) == 1
    prints.add(module(path, sequence_length=8).fingerprint())
    prints.add(module(path, validation_fraction=0.5).fingerprint())
    prints.add(module(path, streaming=True).fingerprint())
    prints.add(module(path, streaming=True, text_column="number").fingerprint())
    assert len(prints) == 5


def test_too_little_text_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": "x"}\n')
    with pytest.raises(UsageError, match="at least two different documents"):
        module(tmp_path / "a.jsonl", cache=False).setup()


def show(quiet_s: float, *, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with Preparing(console, bar=terminal, line_every_s=0.0, quiet_s=quiet_s).phase("tokenizing", "characters", 4_000_000) as advance:
        for _ in range(3):
            time.sleep(0.11)
            advance(1_000_000)
    return out.getvalue()


def test_progress_shows_rate_and_end_once_it_lasts() -> None:
    assert show(60.0, terminal=False) == ""
    lines = show(0.0, terminal=False).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("tokenizing  50% of 4.0 M characters")
    assert "M/s" in lines[1]
    assert lines[1].endswith("left")
    assert "━" in show(0.0, terminal=True)


def test_preparing_moves_the_display_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from swarmtune.train import prepare

    monkeypatch.setattr(prepare, "CHUNK_DOCUMENTS", 3)
    out = io.StringIO()
    data = module(write(tmp_path, "jsonl"), cache=False)
    quick = Preparing(Console(file=out, width=120), line_every_s=0.0, quiet_s=0.0)
    monkeypatch.setattr("swarmtune.train.preparing.CHECK_EVERY_S", 0.0)
    prepare.prepare(data.train_source, None, 0.15, TextForm(16), prepare.load_tokenizer(POCKET), quick)
    assert "reading" in out.getvalue()
    assert "100% of 0.0 M characters" in out.getvalue()


# --- streaming ---------------------------------------------------------------------------------------------------------------


def stream(path: Path, **options: Any) -> TextDataModule:
    return module(path, **{"streaming": True, "shuffle_windows": 7, "sequence_length": 8, "validation_fraction": 0.3, **options})


def take(data: TextDataModule, count: int, state: dict[str, int] | None = None) -> tuple[list[list[list[int]]], dict[str, int]]:
    loader = data.train_dataloader()
    if state is not None:
        loader.load_state_dict(state)
    found = []
    for batch in loader:
        found.append(batch["input_ids"].tolist())
        if len(found) == count:
            break
    loader.close()
    return found, loader.state_dict()


def test_a_stream_trains_on_what_is_not_held_out_and_on_all_of_it(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    data = stream(path, validation_windows=1000)
    both = tokens(module(path, sequence_length=8, cache=False, validation_fraction=0.5))
    held = [token for row in data.windows["val"].held for token in row.tolist()]
    seen, state = take(data, 60)
    in_first_pass = [window for batch in seen[: next(i for i, b in enumerate(seen) if len(b) < 4) + 1] for window in batch]
    assert state["epoch"] > 0
    assert sum(len(window) for window in in_first_pass) - len(held) < len(both["train"]) + len(both["val"]) - len(held)
    trained = sum(len(window) for window in in_first_pass)
    whole = len(both["train"]) + len(both["val"])
    assert abs(trained + len(held) - whole) <= 2 * 8
    assert len(stream(path, validation_windows=2).windows["val"]) == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_goes_on_with_the_very_next_batch(num_workers: int, tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    whole, _ = take(stream(path), 40)
    for done in (1, 25) if num_workers == 0 else (25,):
        first, state = take(stream(path), done)
        rest, _ = take(stream(path, num_workers=num_workers), 40 - done, state)
        assert first + rest == whole
    assert whole != take(stream(path, seed=1), 40)[0]


def test_an_error_in_a_worker_process_is_the_same_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(ROWS + "{bad\n")
    with pytest.raises(UsageError, match=r"^data .*a.jsonl: JSON parse error") as caught:
        take(stream(tmp_path / "a.jsonl", num_workers=1), 100)
    assert "\n" not in str(caught.value)


def test_a_stream_that_shrank_cannot_be_gone_on_with(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    _, state = take(stream(path), 15)
    path.write_text("".join(ROWS.splitlines(keepends=True)[:3]))
    with pytest.raises(UsageError, match=r"the stream ended after \d+ batches in pass 0, where at least 15 were expected"):
        take(stream(path), 1, state)


def test_a_stream_without_held_out_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no document of the stream fell to validation; raise data"):
        stream(write(tmp_path, "jsonl"), validation_fraction=1e-9).setup()


def test_memory_of_a_stream_is_bounded_by_its_buffer(tmp_path: Path) -> None:
    """Rows are read no further than the buffer, one chunk of rows and one of text need."""
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"body": f"word {index} " * 20}) + "\n" for index in range(5000)))
    read_rows = 0
    original = sources.DatasetSource._rows

    def counted(self: DatasetSource) -> Iterator[dict[str, list[Any]]]:
        nonlocal read_rows
        for rows in original(self):
            read_rows += len(rows["body"])
            yield rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.DatasetSource, "_rows", counted)
        take(stream(path), 2)
    assert 0 < read_rows < 2000


# --- the document ------------------------------------------------------------------------------------------------------------

COMMANDS = re.findall(r"^swarmtune (recipe=.*)$", (Path(__file__).parents[2] / "docs" / "data.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_document_find_and_read_their_data(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.jsonl").write_text('{"text": "a note", "question": "why"}\n')
    Path("questions.csv").write_text("question,answer\nwhy,therefore\n")
    Path("chats.jsonl").write_text('{"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "therefore"}]}\n')
    Path("chat.jinja").write_text("{{ messages }}")
    Path("reviews.csv").write_text("review,stars\ngood,3\nbad,1\n")
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("a note\n\nanother")
    datasets_folder = write(tmp_path, "splits").rename("saved")
    config = load_config([*shlex.split(command), *([] if "saved" not in command else ["data.text_column=body"])])
    assert datasets_folder.exists()
    if "org/name" in command:
        assert config.data.path == "org/name"
    else:
        check_data(config)


def test_a_template_on_the_command_line_is_taken_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("q,a\n1,2\n")
    words = ["recipe=lora_bloom", "data=a.csv", r"data.text_template=Q: {q}, ${x}\n{{A: {a}"]
    assert load_config([*words[:2], r"data.text_template=Q: {q}, [x]\n{{A: {a}"]).data.text_template == "Q: {q}, [x]\n{{A: {a}"
    with pytest.raises(UsageError, match=r"there is no column 'x'; there are: q, a"):
        check_data(load_config(words))


@pytest.mark.parametrize(
    ("words", "sentence"), [("data.text_column=body", "there is no column 'body'; there are: q, a"), ("data.split=x", "has no splits")]
)
def test_a_run_is_refused_before_its_directory_is_made(words: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("q,a\n1,2\n")
    with pytest.raises(UsageError, match=sentence):
        train(load_config(["recipe=lora_bloom", "data=a.csv", words]))
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
