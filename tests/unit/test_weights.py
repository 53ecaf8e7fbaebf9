"""Checkpoints read tensor by tensor: only the needed shards, one sentence for each defect, digests that do not depend on the layout of files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from servers import weights as servers_weights
from servers.weights import BlockWeights, load_blocks
from swarmtune import model as client
from swarmtune.errors import ModelUnsupported, UsageError
from swarmtune.skeleton import check_identity, load_config
from swarmtune.types import BlockSpan
from swarmtune.weights import INDEX, SINGLE, Checkpoint, all_finite


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Checkpoint]:
    """Every checkpoint that either half makes."""
    made: list[Checkpoint] = []

    def remember(model: str) -> Checkpoint:
        made.append(Checkpoint(model))
        return made[-1]

    monkeypatch.setattr(servers_weights, "Checkpoint", remember)
    monkeypatch.setattr(client, "Checkpoint", remember)
    return made


def blocks_of(path: Path, start: int = 0, stop: int = 2, dtype: torch.dtype = torch.float32) -> BlockWeights:
    config = load_config(str(path))
    return load_blocks(str(path), config, check_identity(config), BlockSpan(start, stop), dtype, torch.device("cpu"))


def ends_of(path: Path) -> torch.nn.Module:
    config = load_config(str(path))
    return client._load_ends(str(path), config, check_identity(config), "causal_lm", torch.float32)[0]


def weight_map(path: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
    return found


def shards(path: Path, wanted: Callable[[str], bool]) -> set[str]:
    return {shard for name, shard in weight_map(path).items() if wanted(name)}


def in_blocks(name: str, start: int, stop: int) -> bool:
    return any(f".{place}.{block}." in f".{name}" for place in ("h", "layers") for block in range(start, stop))


@pytest.fixture
def copied(bloom: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bloom, tmp_path / "model"))


@pytest.mark.parametrize("family", ["bloom", "llama", "gpt2"])
def test_a_server_opens_only_the_shards_of_its_blocks(models: dict[str, Path], opened: list[Checkpoint], family: str) -> None:
    path = models[family]
    every = set(weight_map(path).values())
    expected = shards(path, lambda name: in_blocks(name, 0, 2))
    assert len(every) >= 4
    assert expected < every
    blocks_of(path)
    assert opened[0].opened == expected


@pytest.mark.parametrize("family", ["bloom", "llama", "gpt2"])
def test_a_client_opens_only_the_shards_of_stem_norm_and_head(models: dict[str, Path], opened: list[Checkpoint], family: str) -> None:
    path = models[family]
    expected = shards(path, lambda name: not in_blocks(name, 0, 4))
    assert expected < set(weight_map(path).values())
    ends_of(path)
    assert opened[0].opened == expected


def test_a_server_needs_no_shard_but_its_own(copied: Path) -> None:
    needed = shards(copied, lambda name: in_blocks(name, 0, 2))
    for shard in set(weight_map(copied).values()) - needed:
        (copied / shard).unlink()
    blocks_of(copied)
    with pytest.raises(ModelUnsupported, match="lacks its shard"):
        ends_of(copied)


def test_loaded_blocks_hold_the_stored_values(bloom: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(bloom, dtype=torch.float32).transformer.h
    for block, module in blocks_of(bloom, 1, 3).blocks.items():
        state = whole[block].state_dict()
        assert module.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) and not value.is_meta for name, value in module.state_dict().items())
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def reshard(path: Path, how: str) -> None:
    """Write the same tensors in another layout."""
    tensors = {name: value for shard in set(weight_map(path).values()) for name, value in load_file(path / shard).items()}
    for shard in set(weight_map(path).values()):
        (path / shard).unlink()
    (path / INDEX).unlink()
    if how == "single":
        save_file(tensors, path / SINGLE, metadata={"format": "pt"})
        return
    places = {name: f"part-{index % 3}.safetensors" for index, name in enumerate(sorted(tensors))}
    for shard in set(places.values()):
        save_file({name: value for name, value in tensors.items() if places[name] == shard}, path / shard, metadata={"format": "pt"})
    prefix = "transformer." if how == "prefix" else ""
    stored = {name.removeprefix("transformer."): name for name in tensors}
    if how == "without prefix":
        for shard in set(places.values()):
            save_file({name.removeprefix("transformer."): value for name, value in load_file(path / shard).items()}, path / shard)
        places = {name: places[full] for name, full in stored.items()}
    assert prefix or places
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("how", ["single", "other shards", "without prefix"])
def test_digests_do_not_depend_on_sharding_or_on_the_base_models_prefix(bloom: Path, copied: Path, how: str) -> None:
    reshard(copied, how)
    assert blocks_of(copied).digests == blocks_of(bloom).digests


def test_digests_name_the_weights_as_stored_whatever_they_are_served_in(bloom: Path) -> None:
    served = blocks_of(bloom, dtype=torch.bfloat16)
    assert served.digests == blocks_of(bloom).digests
    assert len(set(served.digests)) == 2
    assert {parameter.dtype for parameter in served.blocks[0].parameters()} == {torch.bfloat16}


def test_digests_of_other_weights_differ_for_their_block_only(bloom: Path, copied: Path) -> None:
    name = next(name for name in weight_map(copied) if in_blocks(name, 1, 2))
    _rewrite(copied, name, lambda value: value + 1e-3)
    one, other = blocks_of(bloom).digests, blocks_of(copied).digests
    assert one[0] == other[0]
    assert one[1] != other[1]


def _rewrite(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    shard = path / weight_map(path)[name]
    tensors = load_file(shard)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed.contiguous()}, shard, metadata={"format": "pt"})


NAME = "transformer.h.0.mlp.dense_h_to_4h.weight"


def _no_shard(path: Path) -> None:
    (path / weight_map(path)[NAME]).unlink()


def _truncated(path: Path) -> None:
    shard = path / weight_map(path)[NAME]
    shard.write_bytes(shard.read_bytes()[:-100])


def _no_head(path: Path) -> None:
    (path / weight_map(path)[NAME]).write_bytes(b"\xff" * 50)


def _empty(path: Path) -> None:
    (path / weight_map(path)[NAME]).write_bytes(b"")


def _unlisted(path: Path) -> None:
    index = json.loads((path / INDEX).read_text())
    del index["weight_map"][NAME]
    (path / INDEX).write_text(json.dumps(index))


def _unstored(path: Path) -> None:
    _rewrite(path, NAME, lambda value: None)


def _misshapen(path: Path) -> None:
    _rewrite(path, NAME, lambda value: value[:-1])


def _with(number: float) -> Callable[[Path], None]:
    def change(value: torch.Tensor) -> torch.Tensor:
        value[17, 5] = number
        return value

    return lambda path: _rewrite(path, NAME, change)


def _index(text: str) -> Callable[[Path], None]:
    return lambda path: (path / INDEX).write_text(text) and None


def _only_bin(path: Path) -> None:
    for shard in path.glob("*.safetensors*"):
        shard.unlink()
    torch.save({}, path / "pytorch_model.bin")


def _cut_single(path: Path) -> None:
    reshard(path, "single")
    (path / SINGLE).write_bytes((path / SINGLE).read_bytes()[:1000])


DEFECTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing shard": (_no_shard, "lacks its shard model-0"),
    "a truncated shard": (_truncated, "is not a whole safetensors file"),
    "a shard of junk": (_no_head, "is not a whole safetensors file"),
    "an empty shard": (_empty, "is not a whole safetensors file"),
    "a tensor that the index lacks": (_unlisted, f"has no tensor {NAME}"),
    "a tensor that its shard lacks": (_unstored, "is not a whole safetensors file"),
    "a tensor of another shape": (_misshapen, r"has shape \(191, 48\), the configuration asks for \(192, 48\)"),
    "a weight that is NaN": (_with(float("nan")), f"{NAME.removeprefix('transformer.')} holds NaN or infinity in float32"),
    "a weight that is infinite": (_with(float("-inf")), f"{NAME.removeprefix('transformer.')} holds NaN or infinity in float32"),
    "an index that is no JSON": (_index("{"), "is not an index of safetensors shards"),
    "an index without a map": (_index("{}"), "is not an index of safetensors shards"),
    "an index that is a list": (_index("[]"), "is not an index of safetensors shards"),
    "an index that maps to nothing": (_index('{"weight_map": null}'), "is not an index of safetensors shards"),
    "only a pickle": (_only_bin, "convert it to safetensors"),
    "a cut single file": (_cut_single, "is not a whole safetensors file"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defective_checkpoint_is_refused_in_one_sentence(copied: Path, defect: str) -> None:
    break_it, sentence = DEFECTS[defect]
    blocks_of(copied)
    break_it(copied)
    with pytest.raises(ModelUnsupported, match=sentence) as caught:
        blocks_of(copied)
    assert "\n" not in str(caught.value)


def test_a_weight_that_the_served_type_cannot_hold_is_refused(copied: Path) -> None:
    _with(1e6)(copied)
    blocks_of(copied)
    with pytest.raises(ModelUnsupported, match="holds NaN or infinity in float16"):
        blocks_of(copied, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_not_finite_is_found_wherever_it_stands(dtype: torch.dtype) -> None:
    largest = torch.full((3, 37), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(largest)
    assert all_finite(torch.zeros(0, dtype=dtype))
    for place in range(largest.numel()):
        for number in (float("nan"), float("inf"), -float("inf")):
            value = torch.zeros_like(largest)
            value.view(-1)[place] = number
            assert not all_finite(value)


def test_a_shard_name_that_leads_out_of_the_model_is_not_followed(copied: Path) -> None:
    shard = weight_map(copied)[NAME]
    shutil.copy(copied / shard, copied.parent / "outside.safetensors")
    index = json.loads((copied / INDEX).read_text())
    for name, place in index["weight_map"].items():
        if place == shard:
            index["weight_map"][name] = "../outside.safetensors"
    (copied / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelUnsupported, match="outside"):
        blocks_of(copied)


def test_a_path_that_is_a_file_or_missing_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(UsageError, match="is not a directory"):
            Checkpoint(str(path))
