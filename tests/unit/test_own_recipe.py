"""A recipe of the user's own: composed like the bundled ones, and every mistake in it is said with file and line."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from swarmtune.app import load_recipe
from swarmtune.commands.cp import main as cp
from swarmtune.config import load_config, options, to_plain
from swarmtune.errors import UsageError
from swarmtune.own_recipe import check_code, code_names, load_build
from swarmtune.train.run_dir import new_run_dir

CODE = "def build(config, swarm):\n    return config, swarm\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_copy_composes_to_what_the_original_does(here: Path) -> None:
    cp(["lora_bloom", "mine"])
    mine, original = load_config(["recipe=./mine.yaml", "seed=4"]), load_config(["recipe=lora_bloom", "seed=4"])
    assert (mine.recipe, mine.name, mine.title) == (str(here / "mine.py"), "mine", "mine")
    assert original.name == original.title == "lora_bloom"
    same = {"recipe": "", "name": ""}
    assert to_plain(mine) | same == to_plain(original) | same
    assert load_recipe(mine.recipe).__name__ == "checked"


def test_runs_of_an_own_recipe_lie_under_its_name(here: Path) -> None:
    cp(["lora_bloom", "mine"])
    for words, name in ((["recipe=mine.yaml"], "mine"), (["recipe=mine.yaml", "name=other"], "other")):
        config = load_config(words)
        assert new_run_dir(config.run_dir, config.title).parent == here / "runs" / name


def test_its_own_defaults_list_is_honoured_and_it_may_extend_a_bundled_recipe(here: Path) -> None:
    (here / "mine.yaml").write_text("defaults:\n  - lora_bloom\n  - override /adapter: ia3\n  - _self_\noptimizer:\n  weight_decay: 0.25\n")
    found = load_config(["recipe=mine.yaml"])
    assert found.adapter["peft_type"] == "IA3"
    assert (found.recipe, found.optimizer.weight_decay, found.optimizer.lr) == ("lora_bloom", 0.25, 5e-3)
    assert load_config(["recipe=mine.yaml", "adapter=lora"]).adapter["peft_type"] == "LORA"


def test_two_files_in_turn_do_not_mix(here: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        (here / f"{name}.yaml").write_text(f"recipe: lora_bloom\nseed: {seed}\n")
    assert [load_config([f"recipe={name}.yaml"]).seed for name in "aba"] == [1, 2, 1]
    assert load_config(["recipe=lora_bloom"]).seed == 0


def test_the_python_file_is_found_beside_the_yaml_file_from_anywhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "a dir").mkdir()
    (here / "a dir" / "code.py").write_text(CODE)
    (here / "a dir" / "mine.yaml").write_text("recipe: code.py\n")
    (here / "code.py").write_text("raise RuntimeError('the wrong file')\n")
    assert load_config(["recipe=a dir/mine.yaml"]).recipe == str(here / "a dir" / "code.py")


SENTENCES = {
    "recipe: lora_bloom\ndata:\n  batch_sise: 3\n": "mine.yaml, line 3: there is no key data.batch_sise; did you mean data.batch_size?",
    "recipe: lora_bloom\ndata:\n  batch_size: many\n": "mine.yaml, line 3: data.batch_size must be a whole number, got 'many'",
    "recipe: lora_bloom\ntrainer:\n  max_step: 3\n": "mine.yaml, line 3: there is no key trainer.max_step; did you mean trainer.max_steps?",
    "recipe: lora_bloom\nadapter:\n  r: eight\n": "mine.yaml, line 3: adapter.r must be int, got 'eight'",
    "recipe: lora_bloom\nswarm:\n  spans: [0:2, 2:4]\n": "mine.yaml, line 3: swarm.spans[1] must be text, got 124 (quote it",
    "recipe: lora_bloom\noptimizer:\n  lr: -1\n": "mine.yaml, line 3: optimizer.lr must be a finite number above 0, got -1.0",
    "recipe: lora_bloom\noptimizr:\n  lr: 1\n": "mine.yaml, line 2: there is no key optimizr; did you mean optimizer?",
    "recipe: lora_bloom\nseed: 1\nseed: 2\n": "mine.yaml, line 3: the key seed stands in line 2 already",
    "recipe: lora_bloom\na: [1\nb: 2\n": "mine.yaml, line 3: this is not YAML: ",
    "recipe: lora_bloom\nseed: ${nope}\n": "mine.yaml, line 2: Interpolation key 'nope' not found",
    "defaults:\n  - override /modl: pocket_bloom\nrecipe: lora_bloom\n": "mine.yaml, line 2: Could not override 'modl'",
    "defaults:\n  - override /model: pocket_blom\nrecipe: lora_bloom\n": "mine.yaml, line 2: there is no model 'pocket_blom'; there are: pocket",
    "defaults:\n  - lora_blom\n": "mine.yaml, line 2: there is no recipe 'lora_blom'",
    "recipe: lora_blom\n": f"mine.yaml, line 1: there is no recipe 'lora_blom'; there are: {', '.join(options('recipe'))}; a file of your own ends",
    "recipe: gone.py\n": "mine.yaml, line 1: there is no file ",
    "recipe: bad.py\n": "bad.py, line 2: ",
    "recipe: none.py\n": "none.py needs a function build(config, swarm)",
    "recipe: few.py\n": "few.py, line 1: build must take (config, swarm)",
    "seed: 3\n": "mine.yaml: needs a key recipe: a Python file beside it, such as mine.py, or one of bitfit",
    "": "mine.yaml: expected keys and values such as 'recipe: lora_bloom', got nothing",
    "- a\n": "mine.yaml: expected keys and values such as 'recipe: lora_bloom', got something else",
}


@pytest.mark.parametrize("text", SENTENCES, ids=lambda text: text.replace("\n", "|"))
def test_a_mistake_in_a_file_is_one_sentence_with_its_place(text: str, here: Path) -> None:
    (here / "mine.yaml").write_text(text)
    (here / "bad.py").write_text("x = 1\ndef build(config swarm): pass\n")
    (here / "none.py").write_text("def bild(config, swarm): pass\n")
    (here / "few.py").write_text("def build(config): pass\n")
    with pytest.raises(UsageError) as caught:
        load_config(["recipe=mine.yaml"])
    assert SENTENCES[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_a_word_is_not_blamed_on_the_file(here: Path) -> None:
    (here / "mine.yaml").write_text("recipe: lora_bloom\noptimizer:\n  lr: 1e-3\nseed: 1\n")
    for word, said in (
        ("optimizer.lr=-1", "optimizer.lr must be"),
        ("seed=${nope}", "Interpolation"),
        ("optimizer.lrr=1", "there is no key optimizer.lrr"),
    ):
        with pytest.raises(UsageError) as caught:
            load_config(["recipe=mine.yaml", word])
        assert said in str(caught.value)
        assert "line" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("recipe=gone.yaml", "recipe: gone.yaml cannot be read: No such file or directory"),
        ("recipe=mine.py", "recipe: expected a YAML file, got mine.py; swarmtune cp makes"),
        ("recipe=mine", f"there is no recipe 'mine'; there are: {', '.join(options('recipe'))}; did you mean recipe=mine.yaml?"),
        ("recipe=./mine", "recipe: expected a YAML file, got ./mine"),
    ],
)
def test_a_word_that_names_no_yaml_file_is_refused(word: str, said: str, here: Path) -> None:
    (here / "mine.yaml").write_text("recipe: lora_bloom\n")
    with pytest.raises(UsageError) as caught:
        load_config([word])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_package\n" + CODE, "code.py, line 1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("\nx = 1 / 0\n" + CODE, "code.py, line 2: ZeroDivisionError"),
        ("from json import dumps as build, nothing\n", "code.py, line 1: ImportError"),
    ],
)
def test_code_that_cannot_be_imported_is_one_sentence(code: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(code)
    with pytest.raises(UsageError) as caught:
        load_build(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "swarmtune_recipe_code" not in sys.modules


@pytest.mark.parametrize("code", [CODE, "from json import dumps as build\n", "build = print\n", "def build(config, swarm, *, extra=1): pass\n"])
def test_a_build_in_any_form_is_seen(code: str, tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(code)
    check_code(path)


def test_what_build_returns_is_checked_before_training(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(CODE)
    with pytest.raises(UsageError, match=r"must keep the model of swarmtune\.load_causal_lm"):
        load_build(path)(1, 2)
    path.write_text("def build(config, swarm):\n    pass\n")
    with pytest.raises(UsageError, match="must return a LightningModule and a LightningDataModule, got NoneType"):
        load_build(path)(1, 2)
    path.write_text(CODE)
    module = types.SimpleNamespace(model=types.SimpleNamespace(adapter=types.SimpleNamespace(save_pretrained=print)))
    assert load_build(path)(module, 2) == (module, 2)


def test_every_bundled_recipe_has_its_code() -> None:
    assert code_names() == options("recipe")


@pytest.mark.parametrize("name", ["a/b", "..", "."])
def test_a_name_that_is_no_directory_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="name must be the name of a directory"):
        load_config(["recipe=lora_bloom", f"name='{name}'"])
