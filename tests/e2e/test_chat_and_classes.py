"""The recipes for conversations and classes as a user types them: real servers, real hivemind, the embedded model and Python's own text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.e2e.test_main_job import POCKET, run, summary_of

pytestmark = pytest.mark.e2e
SHORT = ["trainer.max_steps=2", "trainer.limit_val_batches=2", "swarm.servers=1", "run_dir=out"]


def test_conversations_train_and_leave_their_template_beside_the_adapter(tmp_path: Path) -> None:
    done = run(["recipe=lora_chat", *SHORT], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "conversations are not packed, each has a row of its own: bloom takes no position_ids" in done.stdout
    assert "are longer than data.sequence_length=256: their ends are cut off" in done.stderr
    assert "Traceback" not in done.stderr
    summary = summary_of(tmp_path / "out")
    assert summary["steps"] == 2
    assert summary["val_loss_after"] < summary["val_loss_before"]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(POCKET), tmp_path / "out" / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    tokenizer.chat_template = (tmp_path / "out" / "adapter" / "chat_template.jinja").read_text()
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi?"}], tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>\nHi?\n<|assistant|>\n"


def test_own_conversations_are_packed_over_the_blocks_of_a_llama(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    tokenizer.save_pretrained(tmp_path / "llama")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "llama")
    lines = [{"messages": [{"role": "user", "content": f"{index}?"}, {"role": "assistant", "content": f"{index}!"}]} for index in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run(["recipe=lora_chat", "model=llama", "data=chats.jsonl", "data.packing=always", *SHORT], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not packed" not in done.stdout
    assert summary_of(tmp_path / "out")["steps"] == 2
    refused = run(["recipe=lora_chat", "data.packing=always", *SHORT[:-1], "run_dir=other"], tmp_path)
    assert refused.returncode == 2
    assert "swarmtune: data.packing=always is not possible: bloom takes no position_ids; with data.packing=auto" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_classes_train_and_leave_their_names_beside_the_adapter(tmp_path: Path) -> None:
    done = run(["recipe=lora_classify", *SHORT], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out accuracy" in done.stdout
    assert "perplexity" not in done.stdout
    summary = summary_of(tmp_path / "out")
    names = json.loads((tmp_path / "out" / "adapter" / "labels.json").read_text())
    assert names == summary["labels"] == ["asyncio", "email", "importlib", "unittest", "xml"]
    base = AutoModelForSequenceClassification.from_pretrained(POCKET, num_labels=len(names))
    PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
