"""Every way of using a PEFT type that is held against PEFT itself (tests/corridor/test_adapters.py), and the page made of it.

``python -m tests.adapter_cases > docs/adapters.md`` writes the page; a unit test keeps the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from swarmtune.adapters.tuners import CACHE_PREFIX, OVER_QUANTISED, PROMPT_LEARNING, REFUSED, TUNERS, Tuner

FAMILIES = ("bloom", "llama")
LINEAR = {"bloom": ["query_key_value", "dense_4h_to_h"], "llama": ["q_proj", "down_proj"]}
SQUARE = {"bloom": ["self_attention.dense"], "llama": ["q_proj", "o_proj"]}
NORMS = {"bloom": ["input_layernorm", "ln_f"], "llama": ["input_layernorm", "model.norm"]}


@dataclass(frozen=True)
class Case:
    """One way to use a PEFT type: settings, and where its targets are."""

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    targets: Mapping[str, list[str]] | None = field(default_factory=lambda: LINEAR)
    tolerance: float = 0.0  # of gradients over one micro-batch: some tensors belong to several blocks
    families: tuple[str, ...] = FAMILIES
    logits: float = 0.0  # of logits: what is computed here once and not for each row has other shapes

    def config(self, family: str) -> PeftConfig:
        settings: dict[str, Any] = {"task_type": "CAUSAL_LM", **self.settings}
        if self.targets is not None:
            settings["target_modules"] = list(self.targets[family])
        if settings.get("feedforward_modules") == "second":
            settings["feedforward_modules"] = self.targets[family][1:] if self.targets else None
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.kind)](**settings)


CASES: Mapping[str, Case] = {
    "lora": Case("LORA", {"r": 4}),
    "rslora": Case("LORA", {"r": 4, "use_rslora": True, "lora_bias": True}),
    "dora": Case("LORA", {"r": 4, "use_dora": True}),
    "lora with biases": Case("LORA", {"r": 4, "bias": "lora_only"}),
    "lora with all biases": Case("LORA", {"r": 4, "bias": "all"}),
    "lora orthogonal": Case("LORA", {"r": 4, "init_lora_weights": "orthogonal"}),
    "lora on stem and head": Case("LORA", {"r": 4}, {"bloom": ["query_key_value", "lm_head"], "llama": ["q_proj", "lm_head", "embed_tokens"]}),
    "lora and a whole norm": Case("LORA", {"r": 4, "modules_to_save": ["input_layernorm"]}),
    "lora and trained tokens": Case("LORA", {"r": 4, "trainable_token_indices": [4, 7, 9]}),
    "lora on some layers": Case("LORA", {"r": 4, "layers_to_transform": [1, 3], "rank_pattern": {"query_key_value|q_proj": 2}}),
    "adalora": Case("ADALORA", {"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 2}),
    "adaption prompt": Case("ADAPTION_PROMPT", {"adapter_len": 4, "adapter_layers": 2}, None, families=("llama",)),
    "beft": Case("BEFT"),
    "boft": Case("BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    "c3a": Case("C3A", {"block_size": 16}),
    "deft": Case("DEFT", {"r": 4}),
    "delora": Case("DELORA", {"r": 4, "rank_pattern": {"query_key_value|q_proj": 2}}),
    "fourierft": Case("FOURIERFT", {"n_frequency": 12}),
    "glora": Case("GLORA", {"r": 4}),
    "gralora": Case("GRALORA", {"r": 4}),
    "hira": Case("HIRA", {"r": 4}),
    "hra": Case("HRA", {"r": 4}),
    "hra gram-schmidt": Case("HRA", {"r": 4, "apply_GS": True}),
    "ia3": Case("IA3", {"feedforward_modules": "second"}),
    "lily": Case("LILY", {"r": 4}, tolerance=1e-6),
    "ln_tuning": Case("LN_TUNING", targets=NORMS),
    "loha": Case("LOHA", {"r": 4}),
    "lokr": Case("LOKR", {"r": 4, "decompose_both": True}),
    "miss": Case("MISS", {"r": 4}),
    "oft": Case("OFT", {"oft_block_size": 4}),
    "oft cayley": Case("OFT", {"oft_block_size": 4, "use_cayley_neumann": False, "block_share": True}),
    "peanut": Case("PEANUT", {"r": 4, "depth": 1}),
    "psoft": Case("PSOFT", {"r": 4}),
    "pvera": Case("PVERA", {"r": 4}),
    "randlora": Case("RANDLORA", {"r": 4}),
    "road": Case("ROAD", {"group_size": 16, "variant": "road_2"}),
    "shira": Case("SHIRA", {"r": 2}),
    "supertuning": Case("SUPERTUNING"),
    "supertuning with lora": Case("SUPERTUNING", {"r": 4}),
    "tinylora": Case("TINYLORA", {"r": 2, "u": 8}, tolerance=1e-6),
    "tinylora tied": Case("TINYLORA", {"r": 2, "u": 8, "weight_tying": 1.0}, tolerance=1e-6),
    "trainable tokens": Case("TRAINABLE_TOKENS", {"token_indices": [4, 5, 9]}, {"bloom": ["word_embeddings"], "llama": ["embed_tokens"]}),
    "unilora": Case("UNILORA", {"r": 4, "theta_d_length": 24}, tolerance=1e-6),
    "vblora": Case("VBLORA", {"r": 4, "vector_length": 16, "num_vectors": 8}, tolerance=1e-6),
    "vera": Case("VERA", {"r": 8}),
    "waveft": Case("WAVEFT", {"n_frequency": 12}),
    "prompt tuning": Case("PROMPT_TUNING", {"num_virtual_tokens": 5}, None),
    "p-tuning": Case("P_TUNING", {"num_virtual_tokens": 5, "encoder_hidden_size": 16}, None),
    "multitask prompt tuning": Case("MULTITASK_PROMPT_TUNING", {"num_virtual_tokens": 5, "num_tasks": 2}, None),
    "cpt": Case("CPT", {"cpt_token_ids": [4, 5, 6], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]}, None),
    "prefix tuning": Case("PREFIX_TUNING", {"num_virtual_tokens": 5}, None, tolerance=1e-6),
    "prefix projection": Case(
        "PREFIX_TUNING", {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 16}, None, tolerance=2e-6, logits=1e-6
    ),
    "cartridge": Case("CARTRIDGE", {"num_virtual_tokens": 5, "num_frozen_tokens": 2}, None, tolerance=1e-6),
}


def page() -> str:
    """docs/adapters.md."""
    return _PAGE.format(
        tuners="\n".join(_tuner_row(kind, TUNERS[kind]) for kind in sorted(TUNERS)),
        prompts="\n".join(
            f"| {kind} | {what} | {'keys and values' if kind in CACHE_PREFIX else 'nothing'} |" for kind, what in PROMPT_LEARNING.items()
        ),
        refused="\n".join(f"| {kind} | {why} |" for kind, why in sorted(REFUSED.items())),
        quantised="\n".join(
            f"| {kind} | {mode} | {', '.join(sorted(dtypes))} |" for kind, modes in sorted(OVER_QUANTISED.items()) for mode, dtypes in modes.items()
        ),
    )


def _tuner_row(kind: str, tuner: Tuner) -> str:
    own = [case for case in CASES.values() if case.kind == kind]
    worst = max(case.tolerance for case in own)
    dropout = f"`{tuner.dropout}`" if tuner.dropout else ", ".join(f"`{name}` must be 0" for name in tuner.unseedable)
    notes = [f"`{name}` must be `{value}`: {why}" for name, (value, why) in tuner.fixed.items()]
    notes += [f"inference only: {tuner.why}"] if not tuner.trains else []
    notes += ["a batch is not cut into micro-batches, because it mixes rows"] if tuner.mixes_rows else []
    notes += ["its tensors are in the stem: nothing travels"] if kind == "TRAINABLE_TOKENS" else []
    asked = ", ".join(f"`{name}`" for name in tuner.derived)
    return f"| {kind} | {'to the bit' if not worst else f'{worst:g}'} | {asked} | {dropout} | {'; '.join(notes)} |"


_PAGE = """# Adapters

`adapter=` takes a file of `conf/adapter` (`swarmtune recipe=lora_bloom adapter=dora`), a saved adapter directory, and in Python any supported
`peft.PeftConfig`, `swarmtune.DeepPromptConfig`, `swarmtune.StandInConfig`, `swarmtune.HeadConfig`, or a list of these. This page is made from the
tables that the code and its tests use: `python -m tests.adapter_cases > docs/adapters.md`.

## PEFT types whose tensors lie in modules

`tests/corridor/test_adapters.py` holds each against PEFT on a BLOOM and a LLaMA: the values of a fresh adapter, its logits, loss and the gradient of
every trainable tensor, over one span and three, one micro-batch and four; and exported adapters loaded by PEFT, PEFT's own loaded here. "Gradients" is
the bound with one micro-batch, as norm of the difference over the norm, per tensor; it is above 0 where blocks share tensors, whose gradients are summed
in another order. With four micro-batches it is 1e-6, or what float32 itself loses where that is more.

Targets in the stem or the head (embeddings, `lm_head`), `modules_to_save`, `trainable_token_indices` and biases work with every type that has them: what
is in the stem or the head is put there by PEFT, on the client. A type that a newer PEFT brings is refused until somebody has looked at it, and a test says so.

| type | gradients | first values from the servers | dropout, seeded | notes |
|---|---|---|---|---|
{tuners}

*First values from the servers*: what PEFT computes from body weights (magnitudes, norms, decompositions) is asked from the servers when the adapter is made,
and so are the biases that `bias=` trains and the modules inside blocks that `modules_to_save` copies.

*AdaLoRA*: recipes run its rule. A loop of one's own calls `model.adapter.after_step(step)` after `optimizer.step()` and before `zero_grad()`, as with PEFT's `update_and_allocate`. Its
regulariser is in the loss while the model trains, and not in a validation's.

*Precision*: all that learns is float32 over any body; copies of norms, heads and biases are cast where they compute.

*Dropout*: a mask is a function of a seed in the call, the block, the place in it, the row and the position, so a recompute, another server, other
spans and other micro-batches see the same one. It is not the mask that a local run draws. Dropout of the body itself is off.

## Virtual tokens

Made by PEFT's own code on the client, and saved in its format.

| type | what learns | what travels |
|---|---|---|
{prompts}

An encoder (P-tuning, prefix projection) is saved as its output, as PEFT does; loaded here, that output is what is trained on. Packed sequences and
`position_ids` are refused with virtual tokens.

## swarmtune's own kinds

| group | configuration | what it is |
|---|---|---|
| `deep_prompts` | `DeepPromptConfig(num_tokens)` | virtual positions left of any padding, with mask 1; each block adds a prompt of its own to them, and they are removed before the final norm. No PEFT type: `PeftModel` cannot load it |
| `bitfit` | `StandInConfig(parameters)` | stand-ins for frozen parameters of the blocks, by name or pattern (`*bias`, `*layernorm*`, `mlp.dense_h_to_4h.weight`), starting from the servers' values |
| `head` | `HeadConfig()` | the model's head learns, in full, on the client |

A list combines one PEFT type with these: `[LoraConfig(...), DeepPromptConfig(num_tokens=8), HeadConfig()]`, in YAML as
`also: [{{peft_type: DEEP_PROMPTS, num_tokens: 8}}, {{peft_type: HEAD}}]` beside the main type. `trainable=False` keeps a part as it is, acting and not learning. Each part has files of its own in
the saved directory (`deep_prompts.safetensors`, ...); PEFT reads its part only, and does not see the others.

## Over quantised blocks

Only what was seen to equal local PEFT over the same quantised layers is allowed; the rest is refused, on the client and on the server.

| type | blocks held in | computed in |
|---|---|---|
{quantised}

## Refused

| type | because |
|---|---|
{refused}

Also refused, each with its reason: initialisations that change body weights (`pissa`, `olora`, `eva`, `corda`, `loftq`), `target_parameters` (fused experts),
`layer_replication`, aLoRA, Arrow, and every field of a configuration that is neither known nor at its default.
"""


if __name__ == "__main__":
    print(page(), end="")
