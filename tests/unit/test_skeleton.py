"""Which models can be cut into spans exactly, and what names a model."""

from __future__ import annotations

import copy
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BertConfig,
    BloomConfig,
    Cohere2Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GlmMoeDsaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MiniMaxConfig,
    OlmoConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
    XGLMConfig,
    Zamba2Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

import swarmtune
from swarmtune.errors import ModelUnsupported, UsageError
from swarmtune.skeleton import (
    Head,
    build_skeleton,
    call_span,
    check_identity,
    check_span,
    config_digest,
    find_layers,
    hidden_size,
    init_buffers,
    load_config,
    truncate,
)
from swarmtune.train.prepare import load_tokenizer
from swarmtune.types import BlockSpan

POCKET = Path(swarmtune.__file__).parent / "assets" / "pocket_bloom"
COMMON: dict[str, Any] = {"hidden_size": 32, "vocab_size": 64}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_hidden_layers": 3}
ROTARY: dict[str, Any] = {**COMMON, **HEADS, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
LATENT: dict[str, Any] = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GOOD: dict[str, tuple[PretrainedConfig, str, int]] = {
    "bloom": (BloomConfig(**COMMON, n_layer=3, n_head=4), "transformer.h.", 1),
    "llama": (LlamaConfig(**ROTARY), "model.layers.", 0),
    "gpt2": (GPT2Config(**COMMON, n_layer=3, n_head=4, n_positions=16, scale_attn_by_inverse_layer_idx=True), "transformer.h.", 0),
    "opt": (OPTConfig(**COMMON, **HEADS, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=16), "model.decoder.layers.", 0),
    "qwen3": (Qwen3Config(**ROTARY, head_dim=8), "model.layers.", 0),
    "granite": (GraniteConfig(**ROTARY, embedding_multiplier=12.0), "model.layers.", 0),
    "olmo": (OlmoConfig(**ROTARY), "model.layers.", 0),
    "xglm": (XGLMConfig(d_model=32, vocab_size=64, num_layers=3, attention_heads=4, ffn_dim=48, max_position_embeddings=16), "model.layers.", 0),
    "bamba": (BambaConfig(**ROTARY, **MAMBA, attn_layer_indices=[1]), "model.layers.", 2),
    "minimax": (MiniMaxConfig(**ROTARY, head_dim=8, num_local_experts=2, layer_types=["linear_attention"] * 3), "model.layers.", 0),
}
BAD: dict[str, tuple[PretrainedConfig, str]] = {
    "gemma3n": (Gemma3nTextConfig(**ROTARY, layer_types=["full_attention"] * 3, num_kv_shared_layers=0), "span of zero layers is not the identity"),
    "glm_moe_dsa": (
        GlmMoeDsaConfig(**{**ROTARY, "num_key_value_heads": 4}, **LATENT, index_n_heads=2, index_head_dim=8),
        "gives its layer 1 other prev_topk_indices in a span than in the whole model",
    ),
    "gemma4": (
        Gemma4TextConfig(**ROTARY, head_dim=8, global_head_dim=8, hidden_size_per_layer_input=0, num_kv_shared_layers=0),
        "lets its layers hand things to each other through their argument shared_kv_states",
    ),
    "zamba2": (
        Zamba2Config(**COMMON, num_attention_heads=4, num_hidden_layers=3, layers_block_type=["hybrid", "mamba", "hybrid"]),
        r"shares model\.layers\.2\.shared_transformer.* between layer 0 and layer 2",
    ),
    "dynamic rotary scaling": (LlamaConfig(**ROTARY, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "earlier calls"),
    "stored quantised": (LlamaConfig(**ROTARY, quantization_config={"quant_method": "fp8"}), "stored quantised, which spans do not unpack"),
    "bert": (BertConfig(**COMMON, **HEADS, is_decoder=True), "does not run on hidden states alone"),
}


@pytest.mark.parametrize("family", GOOD)
def test_a_mainstream_decoder_passes_the_identity_check(family: str) -> None:
    config, prefix, output_items = GOOD[family]
    before = config.to_dict()
    site = check_identity(config)
    assert (site.prefix, site.num_blocks, site.output_items) == (prefix, 3, output_items)
    assert hidden_size(config) == 32
    assert config.to_dict() == before
    assert site.split(f"{prefix}2.mlp.weight") == (2, "mlp.weight")
    assert site.split("lm_head.weight") is None


@pytest.mark.parametrize("family", BAD)
def test_a_model_that_cannot_be_cut_exactly_is_refused_in_one_sentence(family: str) -> None:
    config, sentence = BAD[family]
    with pytest.raises(ModelUnsupported, match=sentence) as caught:
        check_identity(config)
    assert "\n" not in str(caught.value)


def test_what_layers_may_return_beside_hidden_states_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that hands on a second item, where there is one, runs with stand-ins that return none."""

    def forward(self: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        hidden_BTH, second = inputs_embeds, None
        for layer in self.layers:
            output = layer(hidden_BTH, second)
            hidden_BTH, second = output[0] if isinstance(output, tuple) else output, output[1] if isinstance(output, tuple) and output[1:] else None
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_BTH))

    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(ModelUnsupported, match="gives its layer 1 other 0 in a span than in the whole model"):
        check_identity(LlamaConfig(**ROTARY))


def test_masks_of_the_wrong_layers_are_found_whatever_the_width_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Cohere2Config(**ROTARY, sliding_window=4096, layer_types=["sliding_attention", "full_attention", "full_attention"])
    check_identity(config)

    def without_slices(config: PretrainedConfig, start: int, stop: int, num_blocks: int) -> PretrainedConfig:
        found = copy.deepcopy(config)
        found.num_hidden_layers = stop - start
        return found

    monkeypatch.setattr("swarmtune.skeleton._slice_config", without_slices)
    with pytest.raises(ModelUnsupported, match="gives its layer 1 other attention_mask in a span than in the whole model"):
        check_identity(config)


def test_a_model_without_a_causal_head_is_refused() -> None:
    from transformers import CLIPConfig

    with pytest.raises(ModelUnsupported, match="no causal language model can be built from a 'clip' configuration"):
        check_identity(CLIPConfig())


@pytest.mark.parametrize("family", GOOD)
def test_spans_of_a_model_add_up_to_the_model_to_the_bit(family: str) -> None:
    config, _, _ = GOOD[family]
    site = check_identity(config)
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)

    def span(start: int, stop: int) -> torch.nn.Module:
        model = build_skeleton(config)
        parent = truncate(model, site, start, stop)
        layers = getattr(parent, site.attribute)
        for layer, source in zip(layers, whole.get_submodule(site.prefix[:-1])[start:stop], strict=True):
            layer.load_state_dict(source.state_dict(), assign=True)
        init_buffers(parent, model)
        return parent

    hidden_BTH, mask_BT = torch.randn(2, 6, 32), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        middle_BTH = call_span(span(0, 1), hidden_BTH, attention_mask=mask_BT)
        found = call_span(span(1, 3), middle_BTH, attention_mask=mask_BT)
        layers = [*whole.get_submodule(site.prefix[:-1])]
        parent = span(0, 0)
        setattr(parent, site.attribute, torch.nn.ModuleList(layers))
        parent.config = whole.get_submodule(site.parent_name).config
        expected = call_span(parent, hidden_BTH, attention_mask=mask_BT)
    assert torch.equal(found, expected)
    assert not torch.equal(found, middle_BTH)


def test_layers_of_a_span_keep_what_the_whole_model_made_of_their_number() -> None:
    """MiniMax computes the decay of its attention from a layer's number, GPT-2 its scale."""
    for family, values in {"minimax": "self_attn.slope_rate", "gpt2": "attn.scaling"}.items():
        config = GOOD[family][0]
        site, whole, model = check_identity(config), AutoModelForCausalLM.from_config(config), build_skeleton(config)
        init_buffers(parent := truncate(model, site, 2, 3), model)
        (layer,), other = getattr(parent, site.attribute), whole.get_submodule(f"{site.prefix}2")
        place, _, name = values.rpartition(".")
        mine, theirs = getattr(layer.get_submodule(place), name), getattr(other.get_submodule(place), name)
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))
        first = getattr(whole.get_submodule(f"{site.prefix}0.{place}"), name)
        assert not torch.equal(torch.as_tensor(first), torch.as_tensor(theirs)), "this layer's differs from the first one's"


@pytest.mark.parametrize("head", ["sequence_classification", "token_classification"])
def test_a_skeleton_can_have_another_head(head: Head) -> None:
    model = build_skeleton(LlamaConfig(**ROTARY, num_labels=3), head)
    assert find_layers(model) == find_layers(build_skeleton(LlamaConfig(**ROTARY)))
    assert [tuple(parameter.shape) for name, parameter in model.named_parameters() if "score" in name and name.endswith("weight")] == [(3, 32)]
    with pytest.raises(ModelUnsupported, match=f"no {head.removesuffix('ification').replace('_', ' ')}ifier can be built from a 'mamba' config"):
        build_skeleton(MambaConfig(), head)


def test_a_configuration_without_a_limit_has_a_digest() -> None:
    """Mamba's configurations say with an infinity that there is none, which JSON cannot hold."""
    one, other = BambaConfig(**ROTARY, **MAMBA), BambaConfig(**ROTARY, **MAMBA, time_step_limit=(0.0, 1.0))
    assert one.time_step_limit[1] == float("inf")
    assert config_digest(one) != config_digest(other)
    assert len(config_digest(one)) == 16


def test_a_skeleton_takes_no_memory_and_learns_nothing() -> None:
    model = build_skeleton(GOOD["llama"][0])
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_a_model_is_named_alike_whatever_its_path_dtype_and_library(models: dict[str, Path]) -> None:
    config = load_config(str(models["bloom"]))
    other = copy.deepcopy(config)
    other.dtype, other._name_or_path, other.use_cache, other.transformers_version = torch.bfloat16, "/elsewhere", False, "9.9"
    other.architectures = ["BloomModel"]
    other._attn_implementation = "eager"
    assert config_digest(other) == config_digest(config)
    assert len(config_digest(config)) == 16


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layer": 5},
        {"hidden_size": 64},
        {"n_head": 2},
        {"vocab_size": 97},
        {"layer_norm_epsilon": 1e-6},
        {"apply_residual_connection_post_layernorm": True},
    ],
)
def test_a_model_that_computes_otherwise_is_named_otherwise(models: dict[str, Path], changes: dict[str, Any]) -> None:
    config = load_config(str(models["bloom"]))
    other = copy.deepcopy(config)
    other.update(changes)
    assert config_digest(other) != config_digest(config)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"model_type": "nonsense"}'])
def test_a_directory_without_a_readable_config_is_refused_in_one_sentence(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"has no readable config\.json") as caught:
        load_config(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"n_layer": "x"}, {"n_layer": None}, {"hidden_size": "big"}, {"n_head": 0}, {"hidden_size": -1}])
def test_a_value_of_the_wrong_kind_in_a_config_is_refused_in_one_sentence(models: dict[str, Path], tmp_path: Path, wrong: dict[str, Any]) -> None:
    config = json.loads((models["bloom"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
    with pytest.raises(UsageError, match=r"has no readable config\.json|no causal language model can be built") as caught:
        build_skeleton(load_config(str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(POCKET, model)
    (model / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    named = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}, "tokenizer_class": "Own"}
    if what == "tokenizer_config.json":
        named = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (model / what).write_text(json.dumps({**json.loads((model / what).read_text()), **named}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(UsageError, match="needs code that comes with the model, which swarmtune never runs") as caught:
        load_config(str(model)) if what == "config.json" else load_tokenizer(str(model))
    assert "\n" not in str(caught.value)
    assert not ran.exists()
    assert "[y/N]" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "~/nowhere", "a/b/c", "", "  "])
def test_a_missing_path_is_never_taken_for_a_hub_id(model: str) -> None:
    with pytest.raises(UsageError, match="is not a directory"):
        load_config(model)


def test_a_span_outside_the_model_is_refused_with_its_blocks() -> None:
    assert check_span(BlockSpan(1, 3), 3) == BlockSpan(1, 3)
    with pytest.raises(UsageError, match="blocks 2:4 reach outside the model, which has blocks 0:3"):
        check_span(BlockSpan(2, 4), 3)
