import json
from pathlib import Path

import pytest
import torch

from swarmtune.errors import UsageError
from swarmtune.train.data import IGNORED_LABEL, SHARED_PARAGRAPH_CHARS, Document, Windows, python_topics, read_documents, split_documents

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

TEXTS = [f"document {index} " * (index + 1) for index in range(20)]


def documents(*texts: str) -> list[Document]:
    return [Document(text, text) for text in texts]


def long_paragraphs(items: list[Document]) -> set[str]:
    paragraphs = (" ".join(paragraph.split()) for item in items for paragraph in item.text.split("\n\n"))
    return {paragraph for paragraph in paragraphs if len(paragraph) >= SHARED_PARAGRAPH_CHARS}


def test_held_out_topics_share_no_paragraph_with_training_topics() -> None:
    train, val = split_documents(python_topics(), 0.15)
    assert not long_paragraphs(train) & long_paragraphs(val)
    assert len(train) + len(val) == len(python_topics())
    share = sum(len(item.text) for item in val) / sum(len(item.text) for item in [*train, *val])
    assert 0.1 < share <= 0.15


def test_the_split_depends_on_the_texts_alone() -> None:
    _, val = split_documents(documents(*TEXTS), 0.3)
    _, other_order = split_documents(documents(*reversed(TEXTS)), 0.3)
    assert {item.text for item in val} == {item.text for item in other_order}


def test_equal_documents_are_never_parted() -> None:
    train, val = split_documents(documents(*TEXTS, *TEXTS), 0.3)
    assert not {item.text for item in train} & {item.text for item in val}
    assert len(train) + len(val) == 40


def test_both_sides_get_a_document_even_of_two() -> None:
    train, val = split_documents(documents("a", "b" * 100), 0.01)
    assert [item.text for item in train] == ["b" * 100]
    assert [item.text for item in val] == ["a"]


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(UsageError, match="at least two different documents"):
        split_documents(documents("a", "a"), 0.5)


def test_packing_keeps_every_token_in_order_and_masks_the_rest() -> None:
    windows = Windows([[1, 2, 3], [4, 5], [6, 7]], length=4, end=9, pad=0)
    assert windows.input_ids_NT.tolist() == [[1, 2, 3, 9], [4, 5, 9, 6], [7, 9, 0, 0]]
    assert windows.mask_NT.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert windows.labels_NT.tolist() == [[1, 2, 3, 9], [4, 5, 9, 6], [7, 9, IGNORED_LABEL, IGNORED_LABEL]]
    assert torch.equal(windows[2]["labels"], windows.labels_NT[2])


def test_a_last_token_alone_in_its_window_is_dropped() -> None:
    assert Windows([[1, 2, 3, 4, 5]], length=4, end=None, pad=0).input_ids_NT.tolist() == [[1, 2, 3, 4]]
    assert len(Windows([[1]], length=4, end=None, pad=0)) == 0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path


def write(folder: Path, kind: str) -> Path:
    import datasets

    rows = datasets.Dataset.from_dict({"body": TEXTS, "number": list(range(20))})
    path = folder / f"data.{kind}"
    if kind == "saved":
        rows.save_to_disk(path)
    elif kind == "splits":
        datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(path)
    elif kind == "directory":
        path.mkdir()
        (path / "some.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    elif kind in ("json", "jsonl"):
        path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    else:
        getattr(rows, f"to_{kind}")(path)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "saved", "splits", "directory"])
def test_local_data_of_every_layout_is_read(kind: str, folder: Path) -> None:
    assert [item.text for item in read_documents(str(write(folder, kind)), "body", "train")] == TEXTS


def test_a_text_file_is_read_by_paragraph(folder: Path) -> None:
    path = folder / "notes (1), [a].txt"
    path.write_text("one\ntwo\n\nthree\n")
    assert [item.text.strip() for item in read_documents(str(path), "text", "train")] == ["one\ntwo", "three"]


def test_wrong_data_is_one_sentence(folder: Path) -> None:
    path = str(write(folder, "jsonl"))
    with pytest.raises(UsageError, match=r"no column 'text'; there are: body"):
        read_documents(path, "text", "train")
    with pytest.raises(UsageError, match=r"no split 'nope'; there are: train, test"):
        read_documents(str(write(folder, "splits")), "body", "nope")
    with pytest.raises(UsageError, match=r"holds int, not text"):
        read_documents(str(write(folder, "csv")), "number", "train")
    (folder / "strange.bin").write_text("x")
    with pytest.raises(UsageError, match=r"must end in one of \.json"):
        read_documents(str(folder / "strange.bin"), "body", "train")
    (folder / "broken.json").write_text("{")
    with pytest.raises(UsageError) as caught:
        read_documents(str(folder / "broken.json"), "body", "train")
    assert "\n" not in str(caught.value)
    (folder / "empty").mkdir()
    with pytest.raises(UsageError, match="empty"):
        read_documents(str(folder / "empty"), "body", "train")
