"""Deep prompts, stand-ins and heads against the same parts trained in a local model; their files; and what is refused."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config, PeftModel, PrefixTuningConfig, PromptTuningConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from swarmtune import DeepPromptConfig, HeadConfig, StandInConfig
from swarmtune.adapters import adapter as adapter_module
from swarmtune.adapters.adapter import offline_adapter, parse
from swarmtune.adapters.tuners import PROMPT_LEARNING
from swarmtune.errors import AdapterUnsupported, KwargError, UsageError
from swarmtune.skeleton import load_config
from swarmtune.types import Kwarg
from tests.corridor.test_adapters import CASES, inputs
from tests.harness import batch, local_peft, loopback, lora, remote, same_bits, set_values, step, trainable, worst_difference

FAMILIES = ("bloom", "llama", "gpt2")
LAYERS = {"bloom": "transformer.h", "llama": "model.layers", "gpt2": "transformer.h"}
TOKENS = 3
NORMS = {"bloom": "*layernorm*", "llama": "*layernorm*", "gpt2": "ln_?.*"}
PROJECTION = {"bloom": "mlp.dense_h_to_4h.weight", "llama": "mlp.down_proj.weight", "gpt2": "mlp.c_fc.weight"}


def plain(path: Path, **options: Any) -> Any:
    """The library's model, frozen, in memory of its own: some kernels give other last bits over a checkpoint's unaligned one."""
    model = AutoModelForCausalLM.from_pretrained(path, **options).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


class LocalPrompts(nn.Module):
    """What a person would write: zeros before the embeddings, a hook on each block that adds its prompt, and a cut before the head."""

    def __init__(self, model: Any, family: str) -> None:
        super().__init__()
        layers = model.get_submodule(LAYERS[family])
        self.deep_prompts = nn.Parameter(torch.zeros(len(layers), TOKENS, model.config.hidden_size))
        self.inner = model
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._adder(number))

    def _adder(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = args[0]
            return (torch.cat([hidden[:, :TOKENS] + self.deep_prompts[number], hidden[:, TOKENS:]], dim=1), *args[1:])

        return hook

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> CausalLMOutput:
        rows = len(input_ids)
        body = self.inner.base_model
        embeds = body.get_input_embeddings()(input_ids)
        more = {}
        if attention_mask is not None:
            more["attention_mask"] = torch.cat([torch.ones(rows, TOKENS, dtype=attention_mask.dtype), attention_mask], dim=1)
        if position_ids is not None:
            more["position_ids"] = torch.cat([torch.arange(TOKENS).expand(rows, TOKENS), position_ids + TOKENS], dim=1)
        embeds = torch.cat([torch.zeros(rows, TOKENS, embeds.shape[2]), embeds], dim=1)
        hidden = body(inputs_embeds=embeds, use_cache=False, **more).last_hidden_state[:, TOKENS:]
        logits = self.inner.lm_head(hidden)
        return CausalLMOutput(loss=self.inner.loss_function(logits, labels, vocab_size=logits.shape[-1]), logits=logits)


def own(model: Any) -> dict[str, nn.Parameter]:
    return dict(model.adapter.named_parameters())


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_deep_prompts_equal_hooks_on_a_local_model_to_the_bit(models: dict[str, Path], family: str, padding: str | None) -> None:
    local = LocalPrompts(plain(models[family]), family)
    with loopback(models[family], ["0:1", "1:4"]) as swarm:
        model = remote(models[family], swarm, DeepPromptConfig(TOKENS))
        set_values([trainable(local), own(model)])
        expected, found = step(local, batch(padding=padding)), step(model, batch(padding=padding))
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])
    assert same_bits(expected[2], found[2])
    assert all(of_block.norm() > 0 for of_block in found[2]["deep_prompts"])


@pytest.mark.parametrize("family", FAMILIES)
def test_deep_prompts_over_four_micro_batches_equal_local_within_1e_6_of_the_norm_in_every_block(models: dict[str, Path], family: str) -> None:
    local = LocalPrompts(plain(models[family]), family)
    with loopback(models[family], micro_batch_tokens=10 + TOKENS) as swarm:
        model = remote(models[family], swarm, DeepPromptConfig(TOKENS))
        set_values([trainable(local), own(model)])
        expected, found = step(local, batch(padding="left")), step(model, batch(padding="left"))
        assert swarm.traffic().calls == 4 * 2 * 2
    pairs = zip(expected[2]["deep_prompts"], found[2]["deep_prompts"], strict=True)
    assert all((theirs - mine).norm() <= 1e-6 * theirs.norm() for theirs, mine in pairs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("masked", [True, False])
def test_given_positions_shift_behind_the_prompts(models: dict[str, Path], family: str, masked: bool) -> None:
    inputs = batch(padding="left" if masked else None)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) if masked else torch.arange(4, 14).expand(4, 10)
    local = LocalPrompts(plain(models[family]), family)
    with loopback(models[family]) as swarm:
        model = remote(models[family], swarm, DeepPromptConfig(TOKENS))
        set_values([trainable(local), own(model)])
        expected, found = step(local, inputs), step(model, inputs)
        unshifted = step(model, {name: value for name, value in inputs.items() if name != "position_ids"})
    assert torch.equal(expected[0], found[0])
    assert same_bits(expected[2], found[2])
    if family == "gpt2":  # rotary distances do not change when all positions move by four
        assert not torch.equal(unshifted[0], found[0])


def test_packed_sequences_under_deep_prompts_are_refused(models: dict[str, Path]) -> None:
    inputs = batch()
    inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]] * 4)
    with loopback(models["llama"]) as swarm:
        model = remote(models["llama"], swarm, DeepPromptConfig(TOKENS))
        with pytest.raises(UsageError, match="packed sequences cannot be used with deep prompts"):
            model(**inputs)


def renamed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


PARTS = {"biases": lambda family: "*bias", "norms": NORMS.get, "a whole projection": PROJECTION.get}


@pytest.mark.parametrize(("family", "what"), [(family, what) for family in FAMILIES for what in PARTS if (family, what) != ("llama", "biases")])
def test_stand_ins_start_as_the_frozen_model_and_get_the_gradients_of_its_own_parameters_to_the_bit(
    models: dict[str, Path], family: str, what: str
) -> None:
    local = plain(models[family])
    pattern = PARTS[what](family)
    with loopback(models[family], ["0:2", "1:4"]) as swarm:
        model = remote(models[family], swarm, StandInConfig([pattern]))
        names = [name.removeprefix("param.") for name in own(model)]
        assert names
        for name in names:
            local.get_parameter(name).requires_grad_()
        assert torch.equal(remote(models[family], swarm)(**batch()).logits, model(**batch()).logits)
        assert all(torch.equal(value, local.get_parameter(name.removeprefix("param."))) for name, value in own(model).items())
        with torch.no_grad():
            for name, value in own(model).items():
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
                local.get_parameter(name.removeprefix("param.")).copy_(value)
        expected, found = step(local, batch(padding="left")), step(model, batch(padding="left"))
    assert torch.equal(expected[0], found[0])
    assert {name: True for name in found[2]} == {f"param.{name}": True for name in expected[2]}, "BitFit is every bias of every block, and no other"
    assert all(torch.equal(grad, found[2][f"param.{name}"]) for name, grad in expected[2].items())
    assert any(grad.norm() > 0 for grad in found[2].values())


def test_stand_ins_of_some_layers_leave_the_others_alone(bloom: Path) -> None:
    with loopback(bloom) as swarm:
        model = remote(bloom, swarm, StandInConfig(["input_layernorm.*"], layers=[1, 3]))
        assert list(own(model)) == [f"param.transformer.h.{block}.input_layernorm.{leaf}" for block in (1, 3) for leaf in ("weight", "bias")]
        assert all(grad.norm() > 0 for grad in step(model, batch())[2].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_over_a_half_precision_body_are_float32_and_start_as_the_frozen_model(bloom: Path, dtype: torch.dtype) -> None:
    with loopback(bloom, dtype=dtype) as swarm:
        frozen = remote(bloom, swarm)(**batch()).logits
        model = remote(bloom, swarm, [StandInConfig(["*bias", "*layernorm.weight"]), HeadConfig()])
        assert all(value.dtype is torch.float32 for value in own(model).values())
        logits, loss, grads = step(model, batch())
    assert torch.allclose(frozen.float(), logits.float(), rtol=2e-2, atol=2e-2)
    assert torch.isfinite(loss)
    assert all(grad.dtype is torch.float32 and bool(torch.isfinite(grad).all()) and grad.norm() > 0 for grad in grads.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_head_equals_local_to_the_bit_and_leaves_tied_embeddings_alone(models: dict[str, Path], family: str) -> None:
    local = plain(models[family])
    local.lm_head.weight = nn.Parameter(local.lm_head.weight.detach().clone())
    with loopback(models[family]) as swarm:
        model = remote(models[family], swarm, HeadConfig())
        assert list(own(model)) == ["head.lm_head.weight"]
        assert torch.equal(local(**batch()).logits, model(**batch()).logits)
        set_values([renamed(trainable(local), "head."), own(model)])
        expected, found = step(local, batch()), step(model, batch())
        assert swarm.traffic().calls == 2 * 2, "nothing below the head learns, so nothing is asked to go back"
    assert torch.equal(expected[0], found[0])
    assert same_bits(renamed(expected[2], "head."), found[2])
    assert torch.equal(model.get_input_embeddings().weight, local.get_input_embeddings().weight)


def everything(family: str) -> list[Any]:
    return [lora(family), DeepPromptConfig(TOKENS), HeadConfig()]


@pytest.mark.parametrize("micro_batch_tokens", [4096, 10 + TOKENS], ids=["one-micro-batch", "four-micro-batches"])
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_lora_deep_prompts_and_a_trained_head_together_equal_local(models: dict[str, Path], family: str, micro_batch_tokens: int) -> None:
    injected = local_peft(models[family], lora(family))
    inner: Any = injected.base_model.model
    for parameter in inner.parameters():
        parameter.data = parameter.data.clone()
    inner.lm_head.weight = nn.Parameter(inner.lm_head.weight.detach().clone())
    local = LocalPrompts(inner, family)
    with loopback(models[family], ["0:1", "1:3", "3:4"], micro_batch_tokens=micro_batch_tokens) as swarm:
        model = remote(models[family], swarm, everything(family))
        theirs = {name.removeprefix("inner.").replace("lm_head", "head.lm_head"): value for name, value in trainable(local).items()}
        mine = {name.removeprefix("base_model.model."): value for name, value in own(model).items()}
        assert set(theirs) == set(mine)
        set_values([mine, theirs])
        expected, found = step(local, batch(padding="left")), step(model, batch(padding="left"))
    here = {name.removeprefix("inner.").replace("lm_head", "head.lm_head"): grad for name, grad in expected[2].items()}
    there = {name.removeprefix("base_model.model."): grad for name, grad in found[2].items()}
    if micro_batch_tokens == 4096:
        assert torch.equal(expected[0], found[0])
        assert all(torch.equal(grad, there[name]) for name, grad in here.items())
    assert worst_difference(here, {name: there[name] for name in here}) <= 1e-6
    assert all(grad.norm() > 0 for grad in there.values())


RECIPES: dict[str, Any] = {
    "deep prompts": lambda: DeepPromptConfig(TOKENS),
    "stand-ins": lambda: StandInConfig(["*bias"], layers=[0, 2]),
    "head": HeadConfig,
    "lora and deep prompts": lambda: [lora("bloom"), DeepPromptConfig(TOKENS)],
    "all of them": lambda: [HeadConfig(), StandInConfig(["*layernorm*"]), lora("bloom"), DeepPromptConfig(TOKENS)],
    "prefixes and a head": lambda: [PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), HeadConfig()],
    "prompt tuning and biases": lambda: [PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), StandInConfig(["*bias"])],
}


def files_of(recipe: Any) -> set[str]:
    items = recipe if isinstance(recipe, list) else [recipe]
    kinds = [getattr(item, "FILE", None) for item in items]
    names = {f"{kind}_config.json" for kind in kinds if kind} | {f"{kind}.safetensors" for kind in kinds if kind}
    return names | ({"adapter_config.json", "adapter_model.safetensors"} if None in kinds else set())


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_saved_loads_again_as_it_was(bloom: Path, tmp_path: Path, name: str) -> None:
    with loopback(bloom) as swarm:
        model = remote(bloom, swarm, RECIPES[name]())
        set_values([own(model)])
        model.adapter.save_pretrained(tmp_path / "out")
        assert {item.name for item in (tmp_path / "out").iterdir()} - {"README.md"} == files_of(RECIPES[name]())
        assert [item.name for item in tmp_path.iterdir()] == ["out"], "nothing temporary is left"
        logits = model(**batch()).logits
        fresh, again = remote(bloom, swarm, RECIPES[name]()), remote(bloom, swarm, str(tmp_path / "out"))
        assert not torch.equal(fresh(**batch()).logits, logits)
        fresh.adapter.load_pretrained(tmp_path / "out")
        for loaded in (fresh, again):
            assert same_bits(own(model), own(loaded))
            assert torch.equal(loaded(**batch()).logits, logits)
        again(**batch()).loss.backward()
        assert all(value.grad is not None for value in own(again).values()), "what is loaded goes on learning"
        again.adapter.save_pretrained(tmp_path / "out")
        assert torch.equal(remote(bloom, swarm, tmp_path / "out")(**batch()).logits, logits)  # type: ignore[arg-type]


PROMPTS = [name for name, case in CASES.items() if case.kind in PROMPT_LEARNING]
MADE = {"p-tuning", "multitask prompt tuning", "prefix projection", "cpt", "cartridge"}
"""What PEFT saves of these is the virtual tokens, not what they are made of."""


@pytest.mark.parametrize("name", PROMPTS)
def test_saved_virtual_tokens_are_taken_over_or_refused_where_an_encoder_made_them(bloom: Path, tmp_path: Path, name: str) -> None:
    with loopback(bloom) as swarm:
        model, other = (remote(bloom, swarm, CASES[name].config("bloom")) for _ in range(2))
        set_values([own(model)])
        model.adapter.save_pretrained(tmp_path / "out")
        if name in MADE:
            with pytest.raises(UsageError, match="holds the virtual tokens that were made, not what makes them"):
                other.adapter.load_pretrained(tmp_path / "out")
            return
        other.adapter.load_pretrained(tmp_path / "out")
        whole = inputs(CASES[name])
        assert same_bits(own(model), own(other))
        assert torch.equal(model(**whole).logits, other(**whole).logits)


def test_a_saved_cpt_adapter_can_be_used_and_not_trained_further(bloom: Path, tmp_path: Path) -> None:
    """PEFT adds the examples' tokens and what was learned up, and bounds only the latter."""
    with loopback(bloom) as swarm:
        model = remote(bloom, swarm, CASES["cpt"].config("bloom"))
        assert torch.isfinite(step(model.train(), inputs(CASES["cpt"]))[1])
        model.adapter.save_pretrained(tmp_path / "out")
        again = remote(bloom, swarm, str(tmp_path / "out"))
        assert torch.equal(model.eval()(**inputs(CASES["cpt"])).logits, again(**inputs(CASES["cpt"])).logits)
        with pytest.raises(AdapterUnsupported, match="a saved adapter of type CPT can be used and not trained further"):
            again.train()(**inputs(CASES["cpt"]))


def test_the_peft_part_of_a_combination_loads_in_peft(bloom: Path, tmp_path: Path) -> None:
    with loopback(bloom) as swarm:
        model = remote(bloom, swarm, everything("bloom"))
        set_values([own(model)])
        model.adapter.save_pretrained(tmp_path / "out")
        alone = remote(bloom, swarm, lora("bloom"))
        with torch.no_grad():
            for name, value in own(alone).items():
                value.copy_(own(model)[name])
        loaded = PeftModel.from_pretrained(plain(bloom), tmp_path / "out").eval()
        assert torch.equal(loaded(**batch()).logits, alone(**batch()).logits)


def test_parts_that_do_not_train_still_act_and_are_saved(bloom: Path, tmp_path: Path) -> None:
    with loopback(bloom) as swarm:
        model = remote(bloom, swarm, [lora("bloom"), DeepPromptConfig(TOKENS, init_std=0.5, trainable=False), HeadConfig(trainable=False)])
        assert not any(name.startswith(("deep_prompts", "head")) for name in trainable(model.adapter))
        assert not torch.equal(remote(bloom, swarm, lora("bloom"))(**batch()).logits, model(**batch()).logits)
        model.adapter.save_pretrained(tmp_path / "out")
        assert torch.equal(remote(bloom, swarm, str(tmp_path / "out"))(**batch()).logits, model(**batch()).logits)


def test_a_save_that_fails_in_the_middle_leaves_the_former_adapter_whole(bloom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = offline_adapter(load_config(str(bloom)), [lora("bloom"), DeepPromptConfig(TOKENS)], str(bloom))
    model.save_pretrained(tmp_path / "out")
    before = {item.name: item.read_bytes() for item in (tmp_path / "out").iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_module.DeepPrompts, "write", full)  # after PEFT's files have been written
    set_values([dict(model.named_parameters())])
    with pytest.raises(UsageError, match=r"cannot be written to .*: No space left on device"):
        model.save_pretrained(tmp_path / "out")
    assert {item.name: item.read_bytes() for item in (tmp_path / "out").iterdir()} == before
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_a_directory_with_files_of_the_user_is_not_replaced(bloom: Path, tmp_path: Path) -> None:
    model = offline_adapter(load_config(str(bloom)), DeepPromptConfig(TOKENS), str(bloom))
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is not an adapter directory: choose another one"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("saved", "wanted", "sentence"),
    [
        ("deep prompts", "head", r"has a part \(deep prompts\)"),
        ("head", "deep prompts", r"has a part \(head\)"),
        ("lora and deep prompts", "all of them", r"there is no stand_in\.safetensors|there is no head\.safetensors"),
        ("deep prompts", "lora and deep prompts", r"there is no adapter_model\.safetensors"),
    ],
)
def test_a_saved_adapter_of_other_parts_is_refused_and_changes_nothing(bloom: Path, tmp_path: Path, saved: str, wanted: str, sentence: str) -> None:
    config = load_config(str(bloom))
    offline_adapter(config, RECIPES[saved](), str(bloom)).save_pretrained(tmp_path / "out")
    model = offline_adapter(config, RECIPES[wanted](), str(bloom))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with pytest.raises(UsageError, match=sentence):
        model.load_pretrained(tmp_path / "out")
    assert same_bits(before, dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is not a whole safetensors file"),
        (lambda path: path.write_bytes(b""), "is not a whole safetensors file"),
        (lambda path: path.unlink(), r"there is no deep_prompts\.safetensors"),
        (lambda path: shutil.copy(path.parent.parent / "four" / path.name, path), r"deep_prompts is \(4, 4, 48\), expected \(4, 3, 48\)"),
        (lambda path: shutil.copy(path.parent.parent / "head" / "head.safetensors", path), "it lacks deep_prompts"),
    ],
)
def test_damaged_or_wrong_tensors_are_refused_in_one_sentence(bloom: Path, tmp_path: Path, damage: Any, sentence: str) -> None:
    config = load_config(str(bloom))
    offline_adapter(config, DeepPromptConfig(4), str(bloom)).save_pretrained(tmp_path / "four")
    offline_adapter(config, HeadConfig(), str(bloom)).save_pretrained(tmp_path / "head")
    offline_adapter(config, DeepPromptConfig(TOKENS), str(bloom)).save_pretrained(tmp_path / "out")
    damage(tmp_path / "out" / "deep_prompts.safetensors")
    with pytest.raises(UsageError, match=sentence) as caught:
        offline_adapter(config, str(tmp_path / "out"), str(bloom))
    assert "\n" not in str(caught.value)


REFUSED: Sequence[tuple[Any, str]] = [
    (["not a directory"], "not an adapter directory"),
    (7, "must be a PeftConfig, a config of swarmtune's or a saved adapter directory, got int"),
    ([lora("bloom"), 7], "must be a PeftConfig, a config of swarmtune's or a saved adapter directory, got int"),
    ([lora("bloom"), IA3Config(target_modules=["x"])], "at most one of a PEFT type, got 2"),
    ([DeepPromptConfig(2), DeepPromptConfig(3)], "at most one of DeepPromptConfig, got 2"),
    ([HeadConfig(), HeadConfig()], "at most one of HeadConfig, got 2"),
    ([PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), DeepPromptConfig(2)], "both add virtual tokens"),
    ([PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), DeepPromptConfig(2)], "both add virtual tokens"),
    ([lora("bloom", modules_to_save=["lm_head"]), HeadConfig()], "modules_to_save and HeadConfig both train the head"),
    ([lora("bloom", bias="all"), StandInConfig(["*bias"])], "bias='all' and StandInConfig both train parameters of the blocks"),
    ([lora("bloom", target_modules=["query_key_value", "lm_head"]), HeadConfig()], "both train the head lm_head"),
    (
        [lora("bloom", modules_to_save=["input_layernorm"]), StandInConfig(["*layernorm*"])],
        "the PEFT configuration and StandInConfig both train transformer.h.0.input_layernorm.weight",
    ),
    (StandInConfig(["no.such.*"]), r"no parameter of a block matches 'no\.such\.\*': a block has .*input_layernorm\.bias"),
    (StandInConfig(["*bias"], layers=[4]), "name block 4, the model has blocks 0:4"),
    ([DeepPromptConfig(2), {}], "got dict"),
]


@pytest.mark.parametrize(("adapter", "sentence"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_adapters_that_cannot_be_are_refused_in_one_sentence(bloom: Path, adapter: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        offline_adapter(load_config(str(bloom)), adapter, str(bloom))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DeepPromptConfig(0), "num_tokens of deep prompts must be an integer from 1"),
        (lambda: DeepPromptConfig(2.0), "num_tokens of deep prompts"),  # type: ignore[arg-type]
        (lambda: DeepPromptConfig(True), "num_tokens of deep prompts"),
        (lambda: DeepPromptConfig(2, init_std=-1), "init_std of deep prompts"),
        (lambda: DeepPromptConfig(2, init_std=float("nan")), "init_std of deep prompts"),
        (lambda: DeepPromptConfig(2, trainable=1), "trainable must be true or false"),  # type: ignore[arg-type]
        (lambda: StandInConfig("*bias"), "must be a list of names or patterns"),
        (lambda: StandInConfig([]), "must be a list of names or patterns"),
        (lambda: StandInConfig(["*bias"], layers=[-1]), "must be block numbers"),
        (lambda: StandInConfig(["*bias"], layers=[]), "must be block numbers"),
        (lambda: HeadConfig(trainable="yes"), "trainable must be true or false"),  # type: ignore[arg-type]
    ],
)
def test_configurations_are_checked_at_birth(make: Any, sentence: str) -> None:
    with pytest.raises(AdapterUnsupported, match=sentence):
        make()


def test_a_directory_without_anything_and_no_directory_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UsageError, match=r"is not an adapter directory: it has no adapter_config\.json, and nothing of swarmtune's own"):
            parse(str(path))


CONFIGS = {"deep_prompts": DeepPromptConfig(TOKENS), "stand_in": StandInConfig(["*bias"]), "head": HeadConfig(), "adapter": lora("bloom")}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def saved(bloom: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    config = load_config(str(bloom))
    for kind, recipe in CONFIGS.items():
        offline_adapter(config, recipe, str(bloom)).save_pretrained(root / kind)
    return {kind: root / kind for kind in CONFIGS}


def try_to_load(bloom: Path, directory: Path) -> None:
    """Whatever the files hold, it works or is a ``UsageError``."""
    with contextlib.suppress(UsageError):
        offline_adapter(load_config(str(bloom)), str(directory), str(bloom))


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_of_a_configuration_that_are_damaged_are_a_usage_error(
    bloom: Path, saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    path = saved[kind] / f"{kind}_config.json"
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    middle = data.draw(st.binary(max_size=4) | st.just(b"[" * 5000 + b"]" * 5000))
    try:
        path.write_bytes(whole[:place] + middle + whole[place + data.draw(st.integers(0, 40)) :])
        try_to_load(bloom, saved[kind])
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_values_of_a_configuration_that_are_wrong_are_a_usage_error(bloom: Path, saved: dict[str, Path], kind: str, data: st.DataObject) -> None:
    path = saved[kind] / f"{kind}_config.json"
    whole = path.read_bytes()
    fields = json.loads(whole)
    name = data.draw(st.sampled_from(sorted(fields)) | st.text(max_size=5))
    fields[name] = data.draw(json_values)
    try:
        path.write_text(json.dumps(fields))
        try_to_load(bloom, saved[kind])
    finally:
        path.write_bytes(whole)


def test_parameters_replaced_in_one_place_only_are_refused_when_used_and_when_saved(bloom: Path, tmp_path: Path) -> None:
    """They would learn, or be saved, without any effect on the model."""
    with loopback(bloom) as swarm:
        model = remote(bloom, swarm, CASES["lora on stem and head"].config("bloom"))
        model.adapter.load_state_dict(copy.deepcopy(model.adapter.state_dict()), assign=True)
        for use in (lambda: model(**batch()), lambda: model.adapter.save_pretrained(tmp_path / "adapter")):
            with pytest.raises(UsageError, match=r"was replaced and is not what the model uses any more"):
                use()
        model = remote(bloom, swarm, HeadConfig())
        model.tie_weights()
        with pytest.raises(UsageError, match=r"is not the model's head any more"):
            model(**batch())
    assert not (tmp_path / "adapter").exists()


def test_a_saved_adapter_with_more_parts_is_no_silent_half(bloom: Path, tmp_path: Path) -> None:
    with loopback(bloom) as swarm:
        both = remote(bloom, swarm, [lora("bloom"), DeepPromptConfig(num_tokens=2)])
        both.adapter.save_pretrained(tmp_path / "both")
        with pytest.raises(UsageError, match=r"has a part \(deep prompts\) that this adapter does not have"):
            remote(bloom, swarm, lora("bloom")).adapter.load_pretrained(tmp_path / "both")


def test_a_remote_model_is_not_copied_and_a_generator_of_kwargs_counts(bloom: Path) -> None:
    with loopback(bloom) as swarm:
        model = remote(bloom, swarm)
        with pytest.raises(UsageError, match="cannot be copied or pickled"):
            copy.deepcopy(model)
        hidden, prompt = torch.randn(1, 4, 48), torch.randn(2, 48)
        listed = model.body(hidden, kwargs=[Kwarg("prompt", prompt)])
        assert torch.equal(listed, model.body(hidden, kwargs=(Kwarg("prompt", prompt) for _ in range(1))))
        assert not torch.equal(listed, model.body(hidden))
        with pytest.raises(KwargError, match="axes must be a mapping"):
            Kwarg("prompt", prompt, axes=["batch"])  # type: ignore[arg-type]


def test_modules_to_save_that_match_nothing_are_refused(bloom: Path) -> None:
    with pytest.raises(AdapterUnsupported, match="modules_to_save names 'nope'"):
        offline_adapter(load_config(str(bloom)), lora("bloom", modules_to_save=["ln_f", "nope"]), "a model")
