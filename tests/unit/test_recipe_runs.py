"""Whole runs of the recipes for conversations and classes on stand-ins: what they write, and that a broken run goes on to the same adapter."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import swarmtune
from swarmtune import app
from swarmtune.cli import _facts, _loading_lines
from swarmtune.config import load_config
from swarmtune.errors import SwarmError, UsageError
from swarmtune.resume import plan_run
from swarmtune.train.module import AdapterModule, CausalLMModule
from tests.unit.stand_in import SHORT, classifier_stand_in

pytestmark = pytest.mark.usefixtures("one_thread", "swarm")


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, initializer_range=0.3)).save_pretrained(folder)
    return folder


@pytest.fixture
def classifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(swarmtune), "load_sequence_classifier", classifier_stand_in)


def words(recipe: str, model: Path, run_dir: Path, *more: str) -> list[str]:
    return [f"recipe={recipe}", f"model={model}", f"run_dir={run_dir}", "data.sequence_length=48", "data.batch_size=4", *SHORT, *more]


def run(recipe: str, model: Path, run_dir: Path, *more: str) -> dict[str, Any]:
    return app.train(load_config(words(recipe, model, run_dir, *more)))


def adapter_of(run_dir: Path) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in load_file(run_dir / "adapter" / "adapter_model.safetensors").items()}


def test_a_run_on_conversations_pads_for_a_bloom_and_says_so(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run("lora_chat", tiny_model, tmp_path / "run", "optimizer.lr=1e-2", "optimizer.warmup_steps=0")
    said = capsys.readouterr().out
    assert "conversations are not packed, each has a row of its own: bloom takes no position_ids" in said
    assert summary["val_loss_after"] < summary["val_loss_before"]
    assert "perplexity" in said
    for folder in (tmp_path / "run" / "adapter", tmp_path / "run" / "checkpoints" / "step=2" / "adapter"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
        assert "{%- generation %}" in (folder / "chat_template.jinja").read_text()
    with pytest.raises(UsageError, match=r"data\.packing=always is not possible: bloom takes no position_ids"):
        run("lora_chat", tiny_model, tmp_path / "other", "data.packing=always")


def test_conversations_are_packed_for_a_rotary_model(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    step = CausalLMModule.training_step
    monkeypatch.setattr(CausalLMModule, "training_step", lambda self, batch, index: (seen.append(batch), step(self, batch, index))[1])
    summary = run("lora_chat", tiny_llama, tmp_path / "run", "optimizer.lr=1e-2", "optimizer.warmup_steps=0", "data.sequence_length=160")
    assert summary["val_loss_after"] < summary["val_loss_before"]
    assert all(batch.keys() == {"input_ids", "position_ids", "labels"} and batch["input_ids"].shape == (4, 160) for batch in seen)
    assert max(int((batch["position_ids"] == 0).sum()) for batch in seen) > 4
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    counted = [float(row["tokens"]) for row in rows if row["tokens"]][-1]
    assert 0 < counted < 4 * 4 * 160


def test_the_validation_loss_is_over_what_the_assistant_says(tiny_model: Path, tmp_path: Path) -> None:
    only, everything = (
        run("lora_chat", tiny_model, tmp_path / name, f"data.train_on={name}", "trainer.limit_val_batches=null")["val_loss_before"]
        for name in ("completions", "everything")
    )
    assert only != everything
    _, data = app.load_recipe("lora_chat")(load_config(words("lora_chat", tiny_model, tmp_path / "x")), None)  # type: ignore[arg-type]
    model, total, count = AutoModelForCausalLM.from_pretrained(tiny_model), 0.0, 0
    rows = data.windows["val"]
    with torch.no_grad():
        for index in range(len(rows)):
            batch = rows.batch([index])
            labels = batch.pop("labels")[0, 1:]
            logits = model(**batch).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    assert only == pytest.approx(total / count, rel=1e-4)


@pytest.mark.usefixtures("classifiers")
def test_a_run_on_classes_tells_its_accuracy_and_keeps_their_names(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run("lora_classify", tiny_model, tmp_path / "run", "callbacks.line_every_s=0.001")
    said = capsys.readouterr().out
    assert "accuracy" in said
    assert "perplexity" not in said
    assert summary["labels"] == ["asyncio", "email", "importlib", "unittest", "xml"]
    assert 0 <= summary["val_accuracy_before"] <= 1
    assert summary["val_ppl_after"] is None
    assert json.loads((tmp_path / "run" / "adapter" / "labels.json").read_text()) == summary["labels"]
    assert json.loads((tmp_path / "run" / "checkpoints" / "step=4" / "adapter" / "labels.json").read_text()) == summary["labels"]
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    accuracies = [float(row["val_accuracy"]) for row in rows if row["val_accuracy"]]
    assert len(accuracies) == 3
    assert [accuracies[0], accuracies[-1]] == pytest.approx([summary["val_accuracy_before"], summary["val_accuracy_after"]])
    assert dict(_facts(summary))["held-out accuracy"] == f"{accuracies[0]:.1%} -> {accuracies[-1]:.1%}"
    exec(_loading_lines(summary), loaded := {})
    assert isinstance(loaded["model"].get_base_model(), AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=5).__class__)


@pytest.mark.usefixtures("classifiers")
@pytest.mark.parametrize(("recipe", "family"), [("lora_chat", "bloom"), ("lora_chat", "llama"), ("lora_classify", "bloom")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_broken_run_goes_on_to_the_adapter_of_the_unbroken_one(
    recipe: str, family: str, accumulate: int, tiny_model: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"bloom": tiny_model, "llama": tiny_llama}[family]
    options = ["trainer.max_steps=9", "trainer.limit_train_batches=7", f"trainer.accumulate_grad_batches={accumulate}"]
    options += ["callbacks.checkpoint_every_steps=3", "trainer.val_check_interval=4"]
    whole = run(recipe, model, tmp_path / "whole", *options)
    step, seen = AdapterModule.training_step, iter(range(1000))

    def broken(self: AdapterModule, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if next(seen) == 5:
            raise SwarmError("nobody answers")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterModule, "training_step", broken)
        with pytest.raises(SwarmError, match="nobody answers"):
            run(recipe, model, tmp_path / "broken", *options)
    plan = plan_run([f"resume={tmp_path / 'broken'}"])
    resumed = app.train(plan.config, resume=plan.run_dir)
    assert adapter_of(tmp_path / "whole") == adapter_of(tmp_path / "broken")
    for name in ("val_loss_before", "val_loss_after", "val_accuracy_before", "val_accuracy_after"):
        assert whole.get(name) == resumed.get(name), name


def test_a_chat_of_ones_own_in_every_wording(tiny_model: Path, tmp_path: Path) -> None:
    lines = [{"q": f"what is {index}", "a": "the end of a function" * (index % 3 + 1)} for index in range(30)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}")
    run(
        *("lora_chat", tiny_model, tmp_path / "run", f"data={tmp_path / 'own.jsonl'}", "data.prompt_column=q", "data.completion_column=a"),
        *(f"data.chat_template_file={tmp_path / 't.jinja'}", "data.too_long=drop", "trainer.max_steps=2"),
    )
    assert (tmp_path / "run" / "adapter" / "chat_template.jinja").read_text() == (tmp_path / "t.jinja").read_text()
    stream = ["data.streaming=true", "data.shuffle_windows=7", "trainer.max_steps=2", "data.prompt_column=q", "data.completion_column=a"]
    run("lora_chat", tiny_model, tmp_path / "stream", f"data={tmp_path / 'own.jsonl'}", *stream)


def test_a_python_without_its_sources_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match="this Python comes without the sources of its library"):
        app.check_data(load_config(["recipe=lora_chat"]))
    app.check_data(load_config(["recipe=lora_bloom"]))
