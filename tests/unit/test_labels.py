"""Labelled texts: reading, an honest split, rows, and a classifier that counts exactly."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from swarmtune.errors import UsageError
from swarmtune.train.callbacks import Meter
from swarmtune.train.data import TextDataModule
from swarmtune.train.module import CausalLMModule, ClassifierModule
from swarmtune.train.python_library import PACKAGES, python_packages
from swarmtune.train.rows import LabelRows, TextRows
from swarmtune.train.sources import DatasetSource
from tests.unit.stand_in import Traffic, classifier_stand_in, quiet_trainer

POCKET = str(Path(__file__).parents[2] / "swarmtune" / "assets" / "pocket_bloom")
TEXTS = [(f"{word} text number {index}", kind) for index in range(20) for word, kind in (("good", "yes"), ("bad", "no"))]


def write(path: Path, rows: Any = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def module(path: Path, **options: Any) -> TextDataModule:
    keys = {"source": "dataset", "format": "labels", "path": str(path), "sequence_length": 16, "batch_size": 4, "cache": False}
    return TextDataModule(POCKET, **{**keys, **options})


def read(path: Path) -> list[tuple[str, str]]:
    return [(item.text, item.label) for item in DatasetSource(str(path), LabelRows(TextRows())).documents()]


def test_classes_are_text_numbers_booleans_or_named_by_the_dataset(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    assert read(write(tmp_path / "a.jsonl", [("x", 3), ("y", 0), ("z", None)])) == [("x", "3"), ("y", "0")]
    assert read(write(tmp_path / "b.jsonl", [("x", True), ("y", False)])) == [("x", "True"), ("y", "False")]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    datasets.Dataset.from_dict({"text": ["x", "y", "z"], "label": [1, 0, -1]}, features=features).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == [("x", "pos"), ("y", "neg")]
    with pytest.raises(UsageError, match=r"column 'label' holds float, not a class \(text, a whole number, true or false\)"):
        read(write(tmp_path / "c.jsonl", [("x", 0.5)]))
    (tmp_path / "d.csv").write_text("text\nx\n")
    with pytest.raises(UsageError, match=r"no column 'label'; there are: text \(set data.text_column and data.label_column\)"):
        read(tmp_path / "d.csv")


def test_packages_of_the_library_are_balanced_and_whole_files_are_held_out() -> None:
    found = python_packages()
    assert found == python_packages()
    counts = Counter(item.label for item in found)
    assert counts.keys() == set(PACKAGES)
    assert len(set(counts.values())) == 1
    assert min(counts.values()) > 50
    data = TextDataModule(POCKET, source="python_packages", format="labels")
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    held = {tuple(row.tolist()) for row in data.windows["val"].batch(range(len(data.windows["val"])))["input_ids"]}
    files: dict[bool, set[str]] = {True: set(), False: set()}
    for item in found:
        tokens = tokenizer(item.text)["input_ids"][:128]
        files[any(list(row[: len(tokens)]) == tokens and not any(row[len(tokens) :]) for row in held)].add(item.group)
    assert not files[True] & files[False]
    assert {data.labels[number] for number in data.windows["val"].batch(range(len(data.windows["val"])))["labels"].tolist()} == set(PACKAGES)


def test_rows_are_texts_with_the_number_of_their_class(tmp_path: Path) -> None:
    data = module(write(tmp_path / "a.jsonl"))
    assert data.labels == ["no", "yes"]
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    found = []
    for side in ("train", "val"):
        assert set(data.windows[side].batch(range(len(data.windows[side])))["labels"].tolist()) == {0, 1}
        for index in range(len(data.windows[side])):
            batch = data.windows[side].batch([index])
            assert batch["attention_mask"].all()
            found.append((tokenizer.decode(batch["input_ids"][0]), data.labels[int(batch["labels"])]))
    assert sorted(found) == sorted(TEXTS)
    assert data.companions() == {"labels.json": '["no", "yes"]\n'}
    other = module(write(tmp_path / "a.jsonl"), label_names=["yes", "maybe", "no"])
    assert other.labels == ["yes", "maybe", "no"]
    assert set(other.windows["train"].batch(range(10))["labels"].tolist()) == {0, 2}
    assert other.fingerprint() != data.fingerprint()


def test_a_text_never_ends_in_a_token_that_fills(tmp_path: Path) -> None:
    """A model reads its answer at the last token that is another."""
    data = module(write(tmp_path / "a.jsonl", [*TEXTS, ("strange<pad><pad>", "yes"), ("<pad>", "no")]))
    rows = [data.windows[side].batch([index])["input_ids"][0] for side in ("train", "val") for index in range(len(data.windows[side]))]
    assert len(rows) == len(TEXTS) + 1
    assert all(row[-1] != data.pad_token for row in rows)


def test_a_class_that_training_does_not_know_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match="there is no class 'perhaps'; there are: no, yes"):
        module(path, validation_path=str(write(tmp_path / "b.jsonl", [("x", "perhaps")]))).setup()
    with pytest.raises(UsageError, match="there is no class 'no'; there are: yes, other"):
        module(path, label_names=["yes", "other"]).setup()
    with pytest.raises(UsageError, match="more than 1000 different classes"):
        module(write(tmp_path / "c.jsonl", [(f"text {index}", str(index)) for index in range(1200)])).setup()
    with pytest.raises(UsageError, match=r"needs data\.format=labels"):
        _ = TextDataModule(POCKET).labels


def test_a_class_of_one_text_is_trained_on_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = module(write(tmp_path / "a.jsonl", [*TEXTS, ("alone", "rare")]))
    assert data.labels == ["no", "rare", "yes"]
    assert "1 classes have a single document, which is trained on and not validated: rare" in caplog.text


def test_prepared_labels_come_back_from_the_cache(tmp_path: Path) -> None:
    keep = {"cache": True, "cache_dir": str(tmp_path / "cache")}
    first, again = (module(write(tmp_path / "a.jsonl"), **keep) for _ in range(2))
    assert first.fingerprint() == again.fingerprint()
    assert first.labels == again.labels
    for side in ("train", "val"):
        one, other = (data.windows[side].batch(range(len(data.windows[side]))) for data in (first, again))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_stream_of_labels_needs_their_names_and_goes_on_where_it_was(tmp_path: Path) -> None:
    options = {"streaming": True, "shuffle_windows": 5, "validation_fraction": 0.3, "label_names": ["no", "yes"]}
    loader = module(write(tmp_path / "a.jsonl"), **options).train_dataloader()
    iterator = iter(loader)
    whole = [next(iterator) for _ in range(9)]
    resumed = module(tmp_path / "a.jsonl", **options).train_dataloader()
    resumed.load_state_dict({"epoch": 0, "batches": 4})
    assert all(torch.equal(batch[name], want[name]) for batch, want in zip(resumed, whole[4:], strict=False) for name in want)


# --- the module --------------------------------------------------------------------------------------------------------------


def test_accuracy_and_loss_are_exact_counts_over_all_rows(tiny_model: Path, tmp_path: Path) -> None:
    data = module(write(tmp_path / "a.jsonl"), validation_fraction=0.4, batch_size=3)
    data.tokenizer = str(tiny_model)
    classifier = ClassifierModule(classifier_stand_in(str(tiny_model), None, num_labels=2))
    classifier.model.config.pad_token_id = data.pad_token
    result = quiet_trainer(tmp_path).validate(classifier, datamodule=data, verbose=False)[0]
    rows, right, total = data.windows["val"], 0, 0.0
    classifier.eval()
    for index in range(len(rows)):
        batch = rows.batch([index])
        with torch.no_grad():
            output = classifier.model(**batch)
        right, total = right + int(output.logits[0].argmax() == batch["labels"][0]), total + float(output.loss)
    assert len(rows) % 3
    assert result["val_accuracy"] == pytest.approx(right / len(rows), rel=1e-6)
    assert result["val_loss"] == pytest.approx(total / len(rows), rel=1e-5)
    assert 0 < right < len(rows)


def test_labelled_texts_are_no_data_for_a_language_model(tiny_model: Path, tmp_path: Path) -> None:
    data = module(write(tmp_path / "a.jsonl"))
    with pytest.raises(UsageError, match=r"data\.format=labels is for a classifier: use recipe=lora_classify"):
        CausalLMModule(torch.nn.Linear(1, 1))(**data.windows["train"].batch([0, 1]))


def test_a_checkpoint_keeps_the_accuracies_seen_so_far() -> None:
    meter, resumed = Meter(Traffic, 0.0), Meter(Traffic, 0.0)
    meter.val_losses, meter.val_accuracies = [(0, 1.5), (4, 1.0)], [(0, 0.25), (4, 0.75)]
    state = meter.state_dict()
    resumed.load_state_dict(state)
    assert resumed.val_accuracies == meter.val_accuracies
    resumed.load_state_dict({name: value for name, value in state.items() if name != "val_accuracies"})  # one of an older run
    assert resumed.val_accuracies == []
