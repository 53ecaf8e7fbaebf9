"""Stored tensors under the names of the modules, converted by the library's own rules: equal to what the library loads, or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, GPTNeoXConfig, MixtralConfig
from transformers.core_model_loading import WeightRenaming

from servers.weights import load_blocks
from swarmtune.errors import ModelUnsupported
from swarmtune.skeleton import build_skeleton, check_identity, in_dtype, load_config
from swarmtune.stored_model import StoredModel, fill, stored_digest
from swarmtune.types import BlockSpan
from swarmtune.weights import SINGLE, Checkpoint, block_names

SIZES = {"hidden_size": 32, "vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 24}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
    "deepseek_v3": DeepseekV3Config(
        **SIZES, **LATENT, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1
    ),
    "gpt_neox": GPTNeoXConfig(**SIZES),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stored")
    for family, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor) * 0.05)
        model.save_pretrained(root / family)
    return {family: root / family for family in CONFIGS}


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path / SINGLE)), path / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_and_ends_hold_what_the_library_loads(stored: dict[str, Path], family: str, dtype: torch.dtype) -> None:
    path = str(stored[family])
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).state_dict()
    config = load_config(path)
    model = build_skeleton(in_dtype(config, dtype))
    fill(model, {name: name for name in model.state_dict()}, StoredModel(model, Checkpoint(path)), torch.device("cpu"))
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items())
    blocks = load_blocks(path, config, check_identity(config), BlockSpan(1, 2), dtype, torch.device("cpu")).blocks
    prefix = check_identity(config).prefix
    assert all(torch.equal(value, expected[f"{prefix}1.{name}"]) for name, value in blocks[1].state_dict().items())


def test_what_the_library_keeps_in_float32_stays_so(stored: dict[str, Path]) -> None:
    path = str(stored["deepseek_v3"])
    config = load_config(path)
    block = load_blocks(path, config, check_identity(config), BlockSpan(1, 2), torch.bfloat16, torch.device("cpu")).blocks[1]
    dtypes = {name: value.dtype for name, value in block.state_dict().items()}
    kept = {name for name, dtype in dtypes.items() if dtype is torch.float32}
    assert kept == {"mlp.gate.e_score_correction_bias"}


def test_experts_are_stored_one_by_one_and_held_as_one(stored: dict[str, Path]) -> None:
    """Otherwise the tests above would compare nothing."""
    names = load_file(stored["mixtral"] / SINGLE).keys()
    assert not any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    assert sum("experts." in name for name in names) == 2 * 4 * 3


def digest(path: Path, block: int) -> tuple[str, int] | None:
    config = load_config(str(path))
    model, site = build_skeleton(config), check_identity(config)
    layer = model.get_submodule(f"{site.prefix}{block}")
    return stored_digest(block_names(layer, site.prefix, block), StoredModel(model, Checkpoint(str(path))))


def test_a_digest_names_what_the_modules_hold_whatever_the_form_in_which_it_is_stored(stored: dict[str, Path], tmp_path: Path) -> None:
    held = AutoModelForCausalLM.from_pretrained(stored["mixtral"], dtype=torch.float32).state_dict()
    shutil.copytree(stored["mixtral"], tmp_path / "held")
    save_file({name: value.contiguous() for name, value in held.items()}, tmp_path / "held" / SINGLE, metadata={"format": "pt"})
    one, other = digest(stored["mixtral"], 1), digest(tmp_path / "held", 1)
    assert one is not None
    assert one == other
    assert one != digest(stored["mixtral"], 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda name, value: None if "experts.2.w1" in name else value, "do not fit together|configuration asks for"),
        (lambda name, value: None if "experts." in name else value, r"has no tensor model\.layers\.0\.mlp\.experts\.gate_up_proj"),
        (lambda name, value: value[:-1].contiguous() if "experts.2.w1" in name else value, "do not fit together"),
        (lambda name, value: value.to(torch.float8_e4m3fn) if "q_proj" in name else value, "is stored in torch.float8_e4m3fn, whose scales"),
        (lambda name, value: torch.full_like(value, torch.nan) if "experts.2.w2" in name else value, "down_proj holds NaN or infinity"),
    ],
    ids=["one expert less", "no experts", "an expert of another shape", "float8 without its scales", "an expert that is NaN"],
)
def test_experts_that_cannot_be_put_together_are_refused_in_one_sentence(
    stored: dict[str, Path], tmp_path: Path, change: Callable[[str, Tensor], Tensor | None], sentence: str
) -> None:
    path = Path(shutil.copytree(stored["mixtral"], tmp_path / "model"))
    rewrite(path, lambda tensors: {name: new for name, value in tensors.items() if (new := change(name, value)) is not None})
    config = load_config(str(path))
    with pytest.raises(ModelUnsupported, match=sentence) as caught:
        load_blocks(str(path), config, check_identity(config), BlockSpan(0, 2), torch.float32, torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_with_names_of_an_older_library_is_read(stored: dict[str, Path], tmp_path: Path) -> None:
    """GPT-NeoX called its head ``embed_out``."""
    path = Path(shutil.copytree(stored["gpt_neox"], tmp_path / "model"))
    assert "embed_out.weight" in load_file(path / SINGLE)
    new = {"embed_out.weight": "lm_head.weight"}
    rewrite(path, lambda tensors: {new.get(name, name): value for name, value in tensors.items()})
    for directory in (path, stored["gpt_neox"]):
        model = build_skeleton(load_config(str(directory)))
        fill(model, {"lm_head.weight": "lm_head.weight"}, StoredModel(model, Checkpoint(str(directory))), torch.device("cpu"))
        assert torch.equal(model.lm_head.weight, load_file(path / SINGLE)["lm_head.weight"])


def test_a_tensor_that_a_rule_would_rename_away_is_read_under_its_own_name(stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the library does: checkpoints of the present may match rules made for older ones."""
    monkeypatch.setattr("swarmtune.stored_model.get_model_conversion_mapping", lambda model: [WeightRenaming("attention", "elsewhere")])
    path = stored["gpt_neox"]
    model, name = build_skeleton(load_config(str(path))), "gpt_neox.layers.0.attention.dense.weight"
    ((found, value),) = StoredModel(model, Checkpoint(str(path))).read([name])
    assert found == name
    assert torch.equal(value, load_file(path / SINGLE)[name])
