"""The architectures that the parity test runs, and the page about them: ``python -m tests.architectures`` prints docs/models.md.

Every row is a tiny model of the library: the sizes in ``SIZES`` that its configuration has, and what the row adds. What the page says of each row is
checked in ``tests/corridor/test_architectures.py``, and what it says of positions and attention in ``tests/unit/test_models_doc.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from swarmtune.repairs import NEUTRAL_VALUES

LAYERS, TOKENS, VOCABULARY = 4, 12, 96
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "global_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "state_size", "mamba_n_heads", "mamba_d_head"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size", "linear_num_value_heads", "rotary_dim", "time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    **{"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
}
"""Sizes by every name that configurations have for them."""


@dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        model_type: the library's name of the architecture.
        positions: how a token's place is known: rotary, alibi, learned, sinusoidal or none.
        attention: full, sliding window, soft-capped, linear, state space, convolution, or several.
        variant: what is special about this row, among rows of the same type.
        experts: whether it is a mixture of experts.
        settings: of its configuration, beside ``SIZES``.
        rounding: how far gradients over several micro-batches may lie from local ones: norm of the difference over the norm, per tensor.
        without: linear layers, by their last name, that PEFT does not take or puts elsewhere (fused experts).
        padded: whether it takes an attention mask.
        refused: the sentence, or its essential part, where it cannot be cut.
    """

    model_type: str
    positions: str = "rotary"
    attention: str = "full"
    variant: str = ""
    experts: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    rounding: float = 0.0
    without: tuple[str, ...] = ()
    padded: bool = True
    refused: str = ""

    @property
    def name(self) -> str:
        """Type and variant."""
        return f"{self.model_type}, {self.variant}" if self.variant else self.model_type

    @property
    def bound(self) -> float:
        """``rounding``, or the goal for this kind of model."""
        return self.rounding or (1e-5 if self.experts else 1e-6)

    def config(self) -> PretrainedConfig:
        """A tiny configuration."""
        kind = CONFIG_MAPPING[self.model_type]
        known = {each.name for each in dataclasses.fields(kind)}
        return kind(**{**{name: value for name, value in SIZES.items() if name in known}, **self.settings})


LOCAL_AND_GLOBAL = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
LINEAR_AND_FULL = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
FUSED = ("gate", "gate_proj", "up_proj", "down_proj")
LATENT = {"num_key_value_heads": 4}
SLIDING, CAPPED = "sliding window", "soft-capped"

ARCHITECTURES = (
    Architecture(
        "afmoe", attention=f"{SLIDING}, full", experts=True, without=FUSED, settings={"layer_types": LOCAL_AND_GLOBAL, "num_dense_layers": 1}
    ),
    Architecture("apertus"),
    Architecture("arcee"),
    Architecture("bamba", attention="state space, full", settings={"attn_layer_indices": [1, 3]}, without=("out_proj",)),
    Architecture("biogpt", "learned"),
    Architecture("bitnet"),
    Architecture("bloom", "alibi"),
    Architecture("codegen"),
    Architecture("cohere", settings={"logit_scale": 0.25}),
    Architecture("cohere2", attention=f"{SLIDING}, full", settings={"layer_types": LOCAL_AND_GLOBAL}),
    Architecture(
        "dbrx",
        experts=True,
        settings={
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    Architecture("deepseek_v2", attention="latent", experts=True, settings=LATENT, without=FUSED),
    Architecture("deepseek_v3", attention="latent", experts=True, settings=LATENT, without=FUSED),
    Architecture("diffllama", attention="differential"),
    Architecture("doge", attention="full with a learned mask"),
    Architecture("dots1", experts=True, without=FUSED),
    Architecture("ernie4_5"),
    Architecture("ernie4_5_moe", experts=True, without=FUSED, settings={"moe_k": 2, "moe_num_experts": 4, "moe_layer_start_index": 1}),
    Architecture("exaone4", attention=f"{SLIDING}, full", settings={"layer_types": LOCAL_AND_GLOBAL}),
    Architecture("falcon", "alibi", variant="alibi", settings={"alibi": True, "new_decoder_architecture": False, "multi_query": False}),
    Architecture("falcon", variant="multi-query", settings={"new_decoder_architecture": False, "multi_query": True}),
    Architecture("falcon", variant="new decoder", settings={"new_decoder_architecture": True, "num_kv_heads": 2}),
    Architecture("falcon_h1", attention="state space beside full", without=("out_proj",), settings={"mamba_d_ssm": 64, "embedding_multiplier": 5.0}),
    Architecture("falcon_mamba", "none", "state space", without=("out_proj",)),
    Architecture("flex_olmo", experts=True, without=FUSED),
    Architecture("gemma"),
    Architecture("gemma2", attention=f"{SLIDING}, full; {CAPPED}", settings={"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0}),
    Architecture("gemma3_text", attention=f"{SLIDING}, full", settings={"layer_types": LOCAL_AND_GLOBAL}),
    Architecture("glm"),
    Architecture("glm4"),
    Architecture("glm4_moe", experts=True, without=FUSED),
    Architecture("gpt2", "learned", variant="scaled by layer", settings={"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": False}),
    Architecture("gpt_bigcode", "learned"),
    Architecture("gpt_neo", "learned", f"{SLIDING}, full", settings={"attention_types": [[["global", "local"], 2]], "window_size": 4}),
    Architecture("gpt_neox"),
    Architecture("gpt_oss", attention=f"{SLIDING}, full, with sinks", experts=True, without=FUSED),
    Architecture("gptj"),
    Architecture("granite", settings={"embedding_multiplier": 12.0, "attention_multiplier": 0.3, "residual_multiplier": 0.2, "logits_scaling": 8.0}),
    Architecture("granitemoe", experts=True, settings={"embedding_multiplier": 12.0}),
    Architecture(
        "granitemoehybrid",
        "none",
        "state space, full",
        experts=True,
        without=("out_proj",),
        settings={"embedding_multiplier": 12.0, "layer_types": LINEAR_AND_FULL},
    ),
    Architecture("granitemoeshared", experts=True, settings={"embedding_multiplier": 12.0}),
    Architecture("helium"),
    Architecture("hunyuan_v1_dense"),
    Architecture("hunyuan_v1_moe", experts=True, without=FUSED, settings={"moe_topk": 2}),
    Architecture("internlm3"),
    Architecture(
        "jamba",
        "none",
        "state space, full",
        experts=True,
        settings={"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        without=("out_proj",),
    ),
    Architecture("jetmoe", experts=True),
    Architecture("lfm2", attention="convolution, full", settings={"layer_types": ["conv", "full_attention", "conv", "conv"]}),
    Architecture(
        "lfm2_moe",
        attention="convolution, full",
        experts=True,
        without=FUSED,
        settings={"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    ),
    Architecture("llama"),
    Architecture(
        "llama",
        variant="llama3 rotary scaling",
        settings={
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    Architecture(
        "llama4_text",
        attention="chunked, full",
        experts=True,
        settings={"attention_chunk_size": 4, "no_rope_layers": [1, 1, 1, 0]},
        without=("router", *FUSED),
    ),
    Architecture("longcat_flash", attention="latent", experts=True, settings={**LATENT, "zero_expert_num": 2}, without=FUSED),
    Architecture("mamba", "none", "state space", without=("out_proj",)),
    Architecture("mamba2", "none", "state space", settings={"num_heads": 8, "head_dim": 8, "n_groups": 1}, without=("out_proj",)),
    Architecture("minicpm3", attention="latent", settings=LATENT),
    Architecture("minimax", attention="linear, full", experts=True, settings={"layer_types": LINEAR_AND_FULL}, without=FUSED),
    Architecture("ministral", attention=f"{SLIDING}, full", settings={"layer_types": LOCAL_AND_GLOBAL}),
    Architecture("mistral", attention=SLIDING),
    Architecture("mixtral", experts=True, without=FUSED),
    Architecture("modernbert-decoder", attention=f"{SLIDING}, full", settings={"local_attention": 8, "layer_types": LOCAL_AND_GLOBAL}),
    Architecture("mpt", "alibi"),
    Architecture("nanochat"),
    Architecture("nemotron"),
    Architecture(
        "nemotron_h",
        "none",
        "state space, full",
        experts=True,
        without=("out_proj", *FUSED),
        settings={
            "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
        },
    ),
    Architecture("olmo", settings={"clip_qkv": 4.0}),
    Architecture("olmo2"),
    Architecture("olmo3", attention=f"{SLIDING}, full", settings={"layer_types": LOCAL_AND_GLOBAL}),
    Architecture("olmoe", experts=True, without=FUSED),
    Architecture("opt", "learned"),
    Architecture("persimmon"),
    Architecture("phi"),
    Architecture("phi3", attention=SLIDING),
    Architecture("phimoe", experts=True, without=("router", *FUSED)),
    Architecture("qwen2", attention=f"{SLIDING}, full", settings={"use_sliding_window": True, "max_window_layers": 2}),
    Architecture("qwen2_moe", experts=True, without=FUSED, settings={"mlp_only_layers": [1]}),
    Architecture("qwen3"),
    Architecture("qwen3_5_text", attention="linear, full", settings={"layer_types": LINEAR_AND_FULL}, rounding=1e-5),
    Architecture("qwen3_moe", experts=True, without=FUSED, settings={"decoder_sparse_step": 2}),
    Architecture("qwen3_next", attention="linear, full", experts=True, without=FUSED, settings={"layer_types": LINEAR_AND_FULL}),
    Architecture("recurrent_gemma", attention=f"{SLIDING}, recurrent", settings={"block_types": ["recurrent", "attention"]}),
    Architecture("seed_oss"),
    Architecture("smollm3", settings={"no_rope_layers": [1, 1, 0, 1]}),
    Architecture("stablelm", settings={"qk_layernorm": True, "use_parallel_residual": True}),
    Architecture("starcoder2", attention=SLIDING),
    Architecture("vaultgemma", attention=f"{SLIDING}, full; {CAPPED}", settings={"attn_logit_softcapping": 5.0}),
    Architecture("xglm", "sinusoidal"),
)
"""What equals the same model run locally."""

REFUSED = (
    Architecture("bert", "learned", settings={"is_decoder": True}, refused="does not run on hidden states alone"),
    Architecture("ctrl", "sinusoidal", refused="expected one list of decoder layers in CTRLLMHeadModel, found none"),
    Architecture("deepseek_v4", experts=True, settings={"num_key_value_heads": 1}, refused="a span of zero layers is not the identity"),
    Architecture(
        "gemma3n_text", settings={"layer_types": LOCAL_AND_GLOBAL, "num_kv_shared_layers": 0}, refused="a span of zero layers is not the identity"
    ),
    Architecture(
        "gemma4_text",
        settings={"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
        refused="lets its layers hand things to each other through their argument shared_kv_states",
    ),
    Architecture("glm_moe_dsa", settings=LATENT, experts=True, refused="gives its layer 1 other prev_topk_indices in a span than in the whole model"),
    Architecture(
        "hrm_text", refused="expected one list of decoder layers in HrmTextForCausalLM, found model.L_module.layers., model.H_module.layers."
    ),
    Architecture(
        "llama",
        variant="dynamic rotary scaling",
        settings={"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        refused="uses dynamic rotary scaling, which depends on earlier calls",
    ),
    Architecture(
        "llama",
        variant="stored quantised",
        settings={"quantization_config": {"quant_method": "fp8"}},
        refused="are stored quantised, which spans do not unpack",
    ),
    Architecture("openai-gpt", "learned", refused="expected one list of decoder layers in OpenAIGPTLMHeadModel, found none"),
    Architecture("rwkv", "none", "linear", refused="does not take the output of a stand-in layer"),
    Architecture("xlnet", refused="expected one list of decoder layers in XLNetLMHeadModel, found none"),
    Architecture(
        "zamba2", attention="state space, full", settings={"layers_block_type": ["mamba", "hybrid"] * 2}, refused="between layer 1 and layer 3"
    ),
)
"""What cannot be cut into spans exactly, and the sentence that says so."""


def page() -> str:
    """docs/models.md."""
    rows = [
        f"| {each.name} | {each.positions} | {each.attention} | {'yes' if each.experts else ''} | {_repair(each)} | {each.bound:g} |"
        for each in ARCHITECTURES
    ]
    refused = [f"| {each.name} | ... {each.refused} ... |" for each in REFUSED]
    return _PAGE.format(count=len({each.model_type for each in ARCHITECTURES}), rows="\n".join(rows), refused="\n".join(refused))


def _repair(each: Architecture) -> str:
    return ", ".join(f"`{name}` = {value:g}" for name, value in NEUTRAL_VALUES.get(each.model_type, {}).items())


_PAGE = """# Models

Any decoder of the `transformers` library whose cut into spans can be shown to be exact is served; nothing is written per architecture but the
values under "repair". The first table is what is tested, not a list of permissions: {count} architectures, built tiny (4 layers, hidden size 32,
random weights) by `tests/architectures.py`, which also writes this page: `python -m tests.architectures > docs/models.md`.

## What equals the same model run locally

For each row `tests/corridor/test_architectures.py` compares a remote model with a local `PeftModel` of the same checkpoint: float32, eval mode, no
cache, LoRA of rank 4 on every linear layer in the blocks that PEFT can take.

- With one micro-batch, over three spans, with left padding, right padding and none, and over one span: logits, loss and the gradient of every
  trainable tensor are the same *to the bit*.
- With four micro-batches, over one span or three, without padding: the loss lies within 1e-6, and each gradient within the bound in the last column
  (norm of the difference over the norm of the tensor). Other matrix shapes round otherwise; experts and recurrences carry that further.

Where experts are fused into one tensor, PEFT puts LoRA on parameters instead of layers (`target_parameters`). That is refused: leave the names of
expert layers out of `target_modules`. Linear layers of state-space blocks that PEFT refuses itself are left out as well.

| model type | positions | attention | experts | repair | bound with four micro-batches |
|---|---|---|---|---|---|
{rows}

## What is refused

A model is refused before anything is served, on the server and on the client, in one sentence.

| model type | the sentence says |
|---|---|
{refused}

## How a model is judged

1. The library builds it without weights, and there is one list of decoder layers in it. No parameter belongs to two layers.
2. With no layers at all, the module that loops over them returns its input to the bit, with and without padding. What would prevent that is made
   neutral: by the kind of module that it is (norms with weights or without, tables of positions, whole stems), or by a value under "repair".
3. Stand-in layers in spans are given, to the bit, what they are given in the whole model: masks, positions, everything. Layers that would hand each
   other anything but hidden states are found by that.
4. Checkpoints are read with the library's own renaming and conversion of stored tensors (experts stored one by one, names of older versions). A
   tensor that is missing is an error, and so is a checkpoint that is stored quantised.
"""


if __name__ == "__main__":
    print(page(), end="")
