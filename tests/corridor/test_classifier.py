"""Models that classify texts or tokens, against the library's own under PEFT: fresh heads, loss, every gradient, files."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from swarmtune import DeepPromptConfig, HeadConfig, StandInConfig, load_causal_lm, load_sequence_classifier, load_token_classifier
from swarmtune.errors import UsageError
from tests.harness import TARGETS, VOCABULARY, loopback, lora, same_bits, set_values, step, trainable, worst_difference

FAMILIES = ("bloom", "llama", "gpt2")
TARGETS_OF = {**TARGETS, "gpt2": ["c_attn"]}
LABELS = 5
PAD = 3
LOAD: Mapping[str, Callable[..., Any]] = {"SEQ_CLS": load_sequence_classifier, "TOKEN_CLS": load_token_classifier}
LIBRARY: Mapping[str, Any] = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
KINDS = [(family, task) for family in FAMILIES for task in LOAD]


def config_of(family: str, kind: str = "lora", task: str | None = None) -> PeftConfig:
    if kind == "prompt tuning":
        return PromptTuningConfig(num_virtual_tokens=4, task_type=task)
    if kind == "prefix tuning":
        return PrefixTuningConfig(num_virtual_tokens=4, task_type=task)
    if kind == "ia3":
        return IA3Config(target_modules=TARGETS_OF[family], feedforward_modules=TARGETS_OF[family][-1:], task_type=task)
    return LoraConfig(r=4, target_modules=TARGETS_OF[family], fan_in_fan_out=family == "gpt2", task_type=task)


def inputs(task: str, padding: str = "right", rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, VOCABULARY, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    place = slice(-3, None) if padding == "right" else slice(0, 3)
    ids[1, place], mask[1, place] = PAD, 0
    labels = torch.randint(LABELS, (rows, 9) if task == "TOKEN_CLS" else (rows,), generator=generator)
    if task == "TOKEN_CLS":
        labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def aligned(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def library(path: Path, task: str, seed: int = 7, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = LIBRARY[task].from_pretrained(path, num_labels=LABELS, **options)
    return aligned(model).eval().requires_grad_(False)


def local(path: Path, task: str, config: PeftConfig, **options: Any) -> Any:
    base = library(path, task, **options)
    config = copy.deepcopy(config)
    config.task_type = task
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, config).eval()


def classifier(path: Path, swarm: Any, task: str, adapter: Any = None, seed: int = 7, **options: Any) -> Any:
    torch.manual_seed(seed)
    return LOAD[task](str(path), swarm, adapter=copy.deepcopy(adapter), **{"num_labels": LABELS, **options})


def own(model: Any) -> dict[str, Tensor]:
    return dict(model.adapter.named_parameters())


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("family", "task"), KINDS)
def test_fresh_logits_loss_and_every_gradient_equal_peft_and_the_head_learns(models: dict[str, Path], family: str, task: str, padding: str) -> None:
    expected = local(models[family], task, config_of(family))
    with loopback(models[family], ["0:1", "1:4"]) as swarm:
        model = classifier(models[family], swarm, task, config_of(family))
        assert type(model) is type(expected.base_model.model)
        assert list(own(model)) == list(trainable(expected))
        assert same_bits(trainable(expected), own(model)), "a fresh head and a fresh adapter have the local values under the same seed"
        whole = inputs(task, padding)
        assert torch.equal(expected(**whole).logits, model(**whole).logits)
        set_values([trainable(expected), own(model)])
        here, there = step(expected, whole), step(model, whole)
    assert torch.equal(here[0], there[0])
    assert torch.equal(here[1], there[1])
    assert same_bits(here[2], there[2])
    assert any("modules_to_save" in name and grad.norm() > 0 for name, grad in there[2].items())


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_four_micro_batches_equal_local_within_1e_6_of_the_norm(models: dict[str, Path], family: str, kind: str) -> None:
    expected = local(models[family], "SEQ_CLS", config_of(family, kind))
    with loopback(models[family], micro_batch_tokens=9) as swarm:
        model = classifier(models[family], swarm, "SEQ_CLS", config_of(family, kind))
        set_values([trainable(expected), own(model)])
        here, there = step(expected, inputs("SEQ_CLS")), step(model, inputs("SEQ_CLS"))
    assert worst_difference(here[2], there[2]) <= 2e-6


@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning"])
@pytest.mark.parametrize(("family", "task"), [(family, task) for family in ("bloom", "llama") for task in LOAD])
def test_virtual_tokens_under_a_classifier_equal_peft(models: dict[str, Path], family: str, task: str, kind: str) -> None:
    expected = local(models[family], task, config_of(family, kind))
    whole = inputs(task, "left")
    if kind == "prompt tuning" and task == "TOKEN_CLS":  # PEFT leaves it to the caller to label virtual tokens
        whole["labels"] = torch.cat([torch.full((4, 4), -100), whole["labels"]], dim=1)
    with loopback(models[family], ["0:1", "1:4"]) as swarm:
        model = classifier(models[family], swarm, task, config_of(family, kind))
        assert same_bits(trainable(expected), own(model))
        set_values([trainable(expected), own(model)])
        here, there = step(expected, whole), step(model, whole)
    assert torch.equal(here[0], there[0])
    assert torch.equal(here[1], there[1])
    assert worst_difference(here[2], there[2]) <= 1e-6


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt tuning", "prefix tuning"])
@pytest.mark.parametrize(("family", "task"), [("bloom", "SEQ_CLS"), ("llama", "TOKEN_CLS")])
def test_exported_classifiers_load_into_peft_and_back(models: dict[str, Path], tmp_path: Path, family: str, task: str, kind: str) -> None:
    path, whole = models[family], {name: value for name, value in inputs(task, "left").items() if name != "labels"}
    with loopback(path) as swarm:
        model = classifier(path, swarm, task, config_of(family, kind))
        set_values([own(model)])
        model.adapter.save_pretrained(tmp_path / "here")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(library(path, task, seed=8), tmp_path / "here").eval()
        assert torch.equal(aligned(loaded)(**whole).logits, model(**whole).logits)
        again = classifier(path, swarm, task, str(tmp_path / "here"), seed=9)
        assert torch.equal(again(**whole).logits, model(**whole).logits)
        fresh = classifier(path, swarm, task, config_of(family, kind), seed=9)
        fresh.adapter.load_pretrained(tmp_path / "here")
        assert same_bits(own(model), own(fresh))
        assert torch.equal(fresh(**whole).logits, model(**whole).logits)
        theirs = local(path, task, config_of(family, kind))
        set_values([trainable(theirs)], seed=6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.save_pretrained(tmp_path / "there")
        mine = classifier(path, swarm, task, str(tmp_path / "there"), seed=9)
        assert torch.equal(theirs(**whole).logits, mine(**whole).logits)
        if kind != "prompt tuning":  # which needs labels for its virtual tokens too
            mine(**inputs(task, "left")).loss.backward()
            assert all(value.grad is not None for value in own(mine).values()), "what was saved goes on learning, the head too"


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_without_an_adapter_the_head_alone_learns_as_it_does_locally(models: dict[str, Path], tmp_path: Path, family: str, task: str) -> None:
    expected = library(models[family], task)
    head = expected.score if task == "SEQ_CLS" or hasattr(expected, "score") else expected.classifier
    head.requires_grad_(True)
    whole = inputs(task)
    with loopback(models[family]) as swarm:
        model = classifier(models[family], swarm, task)
        here, there = step(expected, whole), step(model, whole)
        assert swarm.traffic().calls == 2, "one forward over two spans, and nothing to go back for"
        model.adapter.save_pretrained(tmp_path / "head")
        again = classifier(models[family], swarm, task, str(tmp_path / "head"), seed=9)
        assert torch.equal(again(**whole).logits, model(**whole).logits)
    assert torch.equal(here[0], there[0])
    assert torch.equal(here[1], there[1])
    assert same_bits({f"head.{name}": grad for name, grad in here[2].items()}, there[2])


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_deep_prompts_under_a_classifier_leave_its_last_token_where_it_is(models: dict[str, Path], family: str, padding: str) -> None:
    """The same prompts under a causal model give the hidden states; the head must read those of the last token that is none of padding."""
    whole = inputs("SEQ_CLS", padding)
    with loopback(models[family]) as swarm:
        model = classifier(models[family], swarm, "SEQ_CLS", DeepPromptConfig(3))
        assert {name.partition(".")[0] for name in own(model)} == {"deep_prompts", "head"}
        lm = load_causal_lm(str(models[family]), swarm, adapter=DeepPromptConfig(3))
        set_values([{"deep_prompts": own(model)["deep_prompts"]}, own(lm)])
        hidden = lm.base_model(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"]).last_hidden_state
        last = [8, 5 if padding == "right" else 8, 8, 8]
        logits, _, grads = step(model, whole)
        assert torch.allclose(model.score(hidden[torch.arange(4), last]), logits, atol=1e-6)
    assert all(grad.norm() > 0 for grad in grads.values())


def test_lora_deep_prompts_and_stand_ins_learn_together_under_a_classifier(bloom: Path, tmp_path: Path) -> None:
    parts = [config_of("bloom"), DeepPromptConfig(3), StandInConfig(["*layernorm*"])]
    with loopback(bloom) as swarm:
        model = classifier(bloom, swarm, "SEQ_CLS", parts)
        set_values([own(model)])
        assert all(grad.norm() > 0 for grad in step(model, inputs("SEQ_CLS"))[2].values())
        model.adapter.save_pretrained(tmp_path / "out")
        again = classifier(bloom, swarm, "SEQ_CLS", str(tmp_path / "out"), seed=9)
        assert torch.equal(again(**inputs("SEQ_CLS")).logits, model(**inputs("SEQ_CLS")).logits)


def test_a_saved_adapter_without_a_head_gets_one_that_learns(bloom: Path, tmp_path: Path) -> None:
    """Else a fresh head would stay as it was drawn, and nobody would notice."""
    with loopback(bloom) as swarm:
        for name, parts in (("prompts", DeepPromptConfig(3)), ("biases", StandInConfig(["*bias"])), ("lora", lora("bloom"))):
            load_causal_lm(str(bloom), swarm, adapter=parts).adapter.save_pretrained(tmp_path / name)
        for name in ("prompts", "biases"):
            model = classifier(bloom, swarm, "SEQ_CLS", str(tmp_path / name))
            assert step(model, inputs("SEQ_CLS"))[2]["head.score.weight"].norm() > 0
        with pytest.raises(UsageError, match=r"was trained for CAUSAL_LM, .* SEQ_CLS"):
            classifier(bloom, swarm, "SEQ_CLS", str(tmp_path / "lora"))
        classifier(bloom, swarm, "SEQ_CLS", config_of("bloom")).adapter.save_pretrained(tmp_path / "classifier")
        with pytest.raises(UsageError, match=r"was trained for SEQ_CLS, .* CAUSAL_LM"):
            load_causal_lm(str(bloom), swarm, adapter=str(tmp_path / "classifier"))
        with pytest.raises(UsageError, match=r"is for SEQ_CLS, .* CAUSAL_LM"):
            load_causal_lm(str(bloom), swarm, adapter=config_of("bloom", task="SEQ_CLS"))


def test_two_parts_that_would_both_train_the_head_are_refused(bloom: Path) -> None:
    with loopback(bloom) as swarm:
        with pytest.raises(UsageError, match="both train the head score: use one of them"):
            classifier(bloom, swarm, "SEQ_CLS", [config_of("bloom"), HeadConfig()])


@pytest.mark.parametrize("task", LOAD)
@pytest.mark.parametrize("num_labels", [0, -1, 2.0, True, "three"])
def test_a_number_of_labels_that_is_none_is_refused(bloom: Path, task: str, num_labels: Any) -> None:
    with loopback(bloom) as swarm:
        with pytest.raises(UsageError, match="num_labels must be a positive integer, got"):
            classifier(bloom, swarm, task, num_labels=num_labels)


@pytest.fixture(scope="module")
def trained(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that already has a head for five classes."""
    path = tmp_path_factory.mktemp("trained")
    library(models["llama"], "SEQ_CLS").save_pretrained(path)
    return path


def test_the_head_of_a_checkpoint_is_taken(trained: Path) -> None:
    expected = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    with loopback(trained) as swarm:
        for adapter in (None, config_of("llama")):
            model = classifier(trained, swarm, "SEQ_CLS", adapter, num_labels=None)
            assert model.config.num_labels == LABELS
            assert torch.allclose(expected(**inputs("SEQ_CLS")).logits, model(**inputs("SEQ_CLS")).logits, atol=1e-6)


def test_a_head_for_another_number_of_labels_is_refused_in_one_sentence(trained: Path) -> None:
    with loopback(trained) as swarm:
        with pytest.raises(UsageError, match=r"score\.weight .*\(5, 48\).*\(7, 48\)|num_labels") as caught:
            classifier(trained, swarm, "SEQ_CLS", num_labels=7)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_over_half_precision_bodies_a_head_learns_in_float32(bloom: Path, dtype: torch.dtype) -> None:
    expected = local(bloom, "SEQ_CLS", config_of("bloom"), dtype=dtype)
    with loopback(bloom, dtype=dtype) as swarm:
        _, loss, grads = step(classifier(bloom, swarm, "SEQ_CLS"), inputs("SEQ_CLS"))
        assert torch.isfinite(loss)
        assert all(grad.dtype is torch.float32 and bool(torch.isfinite(grad).all()) for grad in grads.values())
        model = classifier(bloom, swarm, "SEQ_CLS", config_of("bloom"))
        assert all(torch.equal(value, own(model)[name].to(value.dtype)) for name, value in trainable(expected).items())
        assert {value.dtype for value in own(model).values()} == {torch.float32}
        assert torch.allclose(expected(**inputs("SEQ_CLS")).logits.float(), model(**inputs("SEQ_CLS")).logits.float(), atol=2e-2)
        set_values([trainable(expected), own(model)])
        here, there = step(expected, inputs("SEQ_CLS")), step(model, inputs("SEQ_CLS"))
    assert torch.allclose(here[0].float(), there[0].float(), atol=2e-2)
    assert {grad.dtype for grad in there[2].values()} == {torch.float32}
    assert worst_difference({name: grad.float() for name, grad in here[2].items()}, there[2]) <= 5e-2
