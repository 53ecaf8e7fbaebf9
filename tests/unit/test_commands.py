"""The verbs ls, cp, show, validate and export."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from swarmtune.adapters.adapter import offline_adapter
from swarmtune.cli import VERBS, main
from swarmtune.commands import export
from swarmtune.commands.arguments import Parser
from swarmtune.commands.bundled import describe, groups, recipe_files
from swarmtune.config import load_config as load_run_config
from swarmtune.config import options, save_yaml, to_plain
from swarmtune.errors import UsageError
from swarmtune.skeleton import load_config
from swarmtune.train.saved_state import file_digest
from tests.harness import lora


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command ends in exit code 2."""
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("swarmtune: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "serve"])
def test_every_verb_has_its_module(verb: str) -> None:
    assert callable(importlib.import_module(VERBS[verb][0]).main)


@pytest.mark.parametrize("verb", ["ls", "cp", "show", "validate", "export", "completion"])
def test_help_of_a_verb_says_what_it_takes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert f"usage: swarmtune {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sohw"], "there is no command 'sohw'; did you mean show?"),
        (["lora_bloom"], "there is no command 'lora_bloom'; did you mean recipe=lora_bloom?"),
        (["cp", "lora_bloom"], "cp: the following arguments are required: DEST"),
        (["cp", "lora_bloom", "a", "--forc"], "cp: there is no option --forc; did you mean --force?"),
        (["ls", "adapter", "model"], "ls: 'model' is one argument too many"),
        (["ls", "adaptor"], "ls: there is no group 'adaptor'"),
        (["completion", "bahs"], "completion: expected one of bash, fish, zsh, got 'bahs'; did you mean bash?"),
        (["export", "x", "y", "--dtype"], "export: argument --dtype: expected one argument"),
        (["cp", "lora_blom", "x"], f"there is no recipe 'lora_blom'; there are: {', '.join(options('recipe'))}; did you mean lora_bloom?"),
        (["cp", "lora_bloom", "no/such/x"], "cp: there is no directory "),
        (["cp", "lora_bloom", ""], "cp: expected the name of a file to make"),
        (["show", "lora_blom"], "there is no recipe 'lora_blom'"),
        (["show", "seed=3"], "show: expected a recipe first, such as swarmtune show lora_bloom seed=3"),
        (["show", "lora_bloom", "sed=3"], "there is no key sed; did you mean seed?"),
        (["show", "."], ". is not the directory of a run: it has no config.yaml"),
        (["validate", "lora_bloom", "data.batch_sise=3"], "did you mean data.batch_size?"),
        (["validate", "lora_bloom", "swarm.servers=9"], "swarm.servers must be at most 4"),
        (["validate", "lora_bloom", "adapter.target_modules=[nope]"], "match nothing in BloomForCausalLM"),
        (["validate", "lora_bloom", "trainer.precision=33"], "trainer: "),
        (["export", "nothing", "out"], "export: there is no directory "),
        (["export", ".", "out"], "holds no adapter: expected the directory of a run, of a checkpoint or of a PEFT adapter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_word_is_one_sentence(words: list[str], sentence: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in refused(words, capsys)
    assert list(here.iterdir()) == []


# --- ls, cp, show, validate --------------------------------------------------------------------------------------------------


def test_ls_lists_recipes_and_the_options_of_each_group(capsys: pytest.CaptureFixture[str]) -> None:
    recipes = said(["ls"], capsys).splitlines()
    assert [line.split()[0] for line in recipes] == options("recipe")
    assert [line.split(maxsplit=1)[1] for line in recipes if line.startswith("lora_bloom ")] == ["LoRA on a BLOOM whose blocks run on a swarm."]
    for group in groups():
        lines = said(["ls", group], capsys).splitlines()
        assert [line.split()[0] for line in lines] == options(group)


@pytest.mark.parametrize("group", groups())
def test_every_option_is_described(group: str) -> None:
    assert all(len(describe(group, name)) > 10 for name in options(group))


def test_cp_never_overwrites_unless_forced(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(["cp", "lora_bloom", "mine"], capsys) == "wrote mine.yaml and mine.py; run them with: swarmtune recipe=mine.yaml\n"
    assert sorted(path.name for path in here.iterdir()) == ["mine.py", "mine.yaml"]
    (here / "mine.py").write_text("# edited\n")
    (here / "mine.yaml").unlink()
    assert "cp: already there: " in refused(["cp", "lora_bloom", "mine"], capsys)
    assert (here / "mine.py").read_text() == "# edited\n"
    assert not (here / "mine.yaml").exists()
    said(["cp", "lora_bloom", "mine.yaml", "--force"], capsys)
    assert "def build" in (here / "mine.py").read_text()


def test_cp_goes_into_a_directory_and_makes_it_only_if_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "there").mkdir()
    said(["cp", "lora_bloom", "there"], capsys)
    assert load_run_config(["recipe=there/lora_bloom.yaml"]).recipe == str(here / "there" / "lora_bloom.py")
    said(["cp", "lora_bloom", "a/b/it's mine", "--make-parents"], capsys)
    assert load_run_config(["recipe=a/b/it's mine.yaml"]).recipe == str(here / "a" / "b" / "it's mine.py")


def test_cp_writes_both_files_or_none(here: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes((disk.f_bavail - 1) * disk.f_bsize))
    assert "cannot be written: No space left" in refused(["cp", "lora_bloom", str(small_disk / "mine")], capsys)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    (here / "taken.py").mkdir()
    assert "taken.py cannot be written: Is a directory" in refused(["cp", "lora_bloom", "taken", "--force"], capsys)
    assert not (here / "taken.yaml").exists()


def test_a_copy_speaks_of_itself(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(["cp", "lora_bloom", "mine"], capsys)
    for path in here.iterdir():
        assert "recipe=lora_bloom" not in path.read_text()
        assert "recipe=mine.yaml" in path.read_text()


def test_show_prints_the_checked_configuration(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = yaml.safe_load(said(["show", "lora_bloom", "seed=7", "data.batch_size=2"], capsys))
    assert shown == to_plain(load_run_config(["recipe=lora_bloom", "seed=7", "data.batch_size=2"]))
    assert yaml.safe_load(said(["show", "recipe=lora_bloom"], capsys))["seed"] == 0


def test_show_source_prints_both_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(["show", "lora_bloom", "--source"], capsys)
    for path in recipe_files("lora_bloom"):
        assert f"# --- {path}\n{path.read_text()}" in text
    said(["cp", "lora_bloom", "mine"], capsys)
    assert str(here / "mine.py") in said(["show", "--source", "./mine.yaml"], capsys)


def test_show_prints_what_a_run_had(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run").mkdir()
    save_yaml(load_run_config(["recipe=lora_bloom", "seed=3", 'name="a\x1b[2Jb"']), here / "run" / "config.yaml")
    shown = said(["show", "run"], capsys)
    assert shown == (here / "run" / "config.yaml").read_text()
    assert "\x1b" not in shown
    assert yaml.safe_load(shown)["name"] == "a\x1b[2Jb"
    assert "show: run is a run, which has been" in refused(["show", "run", "seed=4"], capsys)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"seed: \xff\n", "cannot be read: "),
        (b"", "must hold the keys of a configuration"),
        (b"- seed\n", "must hold the keys of a configuration"),
        (b"seed: 3\n", ": recipe must be given"),
        (b"seed: \x1b[2J\n", "cannot be read: "),
        (b"recipe: lora_bloom\nsede: 3\n", ": there is no key sede"),
    ],
)
@pytest.mark.parametrize("verb", ["show", "resume"])
def test_a_broken_configuration_of_a_run_is_named(verb: str, content: bytes, sentence: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run").mkdir()
    (here / "run" / "config.yaml").write_bytes(content)
    err = refused(["show", "run"] if verb == "show" else ["resume=run"], capsys)
    assert f"run/config.yaml{sentence if sentence[0] == ':' else ' ' + sentence}" in err
    assert "\x1b" not in err


def test_validate_says_what_would_be_done_and_starts_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(["validate", "lora_bloom"], capsys) == (
        "ok: lora_bloom would train LORA (114,688 of 3,453,184 parameters) on pocket_bloom, 200 steps, "
        "with 2 servers of blocks 0:2, 2:4 on this machine\n"
    )
    words = ["swarm=join", "swarm.initial_peers=[/ip4/127.0.0.1/tcp/1/p2p/x]", "debug=fast", "adapter=ia3"]
    assert said(["validate", "lora_bloom", *words], capsys).endswith("one training and one validation batch, with the swarm that it joins\n")
    assert list(here.iterdir()) == []


def test_settings_that_would_be_ignored_are_refused() -> None:
    join = ["swarm=join", "swarm.initial_peers=[/ip4/127.0.0.1/tcp/1/p2p/x]"]
    for words, sentence in {
        ("swarm.servers=3", 'swarm.spans=["0:2","2:4"]'): "swarm.servers=3 and swarm.spans exclude each other: each span is one server",
        (*join, "swarm.servers=3"): "swarm.servers needs swarm=local",
        (*join, "swarm.dtype=bfloat16"): "swarm.dtype needs swarm=local",
        (*join, "swarm.threads=1"): "swarm.threads needs swarm=local",
        ("logger.project=mine",): "logger.project needs logger=wandb",
    }.items():
        with pytest.raises(UsageError) as caught:
            load_run_config(["recipe=lora_bloom", *words])
        assert sentence in str(caught.value)
    load_run_config(["recipe=lora_bloom", *join, "swarm.servers=2"])
    assert load_run_config(["recipe=lora_bloom", "logger=wandb", "logger.project=mine"]).logger.project == "mine"


# --- export ------------------------------------------------------------------------------------------------------------------


def write_manifest(checkpoint: Path) -> None:
    files = {str(path.relative_to(checkpoint)): file_digest(path) for path in checkpoint.rglob("*") if path.is_file()}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": files}))


def flip(path: Path) -> None:
    """Damage the last byte of a file, which leaves its format as it was."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def trained(bloom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as training leaves it: a final adapter, and checkpoints with other values."""
    run = tmp_path_factory.mktemp("runs") / "run"
    adapter = offline_adapter(load_config(str(bloom)), lora("bloom"), str(bloom))
    for place, seed in (("checkpoints/step=5", 5), ("checkpoints/step=10", 10), (".", 10)):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        adapter.save_pretrained(run / place / "adapter")
        if place != ".":
            (run / place / "state.ckpt").touch()
            write_manifest(run / place)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"path": str(bloom)}}))
    (run / "summary.json").write_text(json.dumps({"steps": 10}))
    return run


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize(
    ("source", "holds", "what"),
    [
        ("", "adapter", "the final adapter"),
        ("checkpoints/step=5", "checkpoints/step=5/adapter", "the adapter of checkpoint step=5"),
        ("checkpoints/step=5/state.ckpt", "checkpoints/step=5/adapter", "the adapter of checkpoint step=5"),
        ("checkpoints/step=5/adapter", "checkpoints/step=5/adapter", "the adapter"),
    ],
)
def test_export_takes_a_run_a_checkpoint_or_an_adapter(
    source: str, holds: str, what: str, trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(["export", str(trained / source), "out/adapter"], capsys)
    assert text.startswith(f"wrote {what} ({trained / holds}) to {here / 'out' / 'adapter'}: ")
    assert same(weights(here / "out" / "adapter"), weights(trained / holds))
    assert [path.name for path in (here / "out").iterdir()] == ["adapter"]


def test_a_run_that_has_not_reached_its_end_gives_its_newest_checkpoint(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(trained, here / "run")
    (run / "summary.json").unlink()
    shutil.copytree(run / "checkpoints" / "step=5" / "adapter", run / "adapter", dirs_exist_ok=True)  # as an interruption at step 5 left it
    assert "the newest checkpoint, step 10 (the run has not reached its end)" in said(["export", "run", "a"], capsys)
    assert same(weights(here / "a"), weights(trained / "checkpoints" / "step=10" / "adapter"))
    shutil.rmtree(run / "adapter")
    assert "the newest checkpoint, step 10" in said(["export", "run", "b"], capsys)
    shutil.rmtree(run / "checkpoints")
    assert "holds no adapter" in refused(["export", "run", "c"], capsys)


def test_what_stands_beside_an_adapter_goes_with_it(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained / "adapter", here / "adapter")
    (here / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    said(["export", "adapter", "out", "--model", yaml.safe_load((trained / "config.yaml").read_text())["model"]["path"]], capsys)
    assert (here / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "chat_template.jinja" in json.loads((here / "out" / export.MARKER).read_text())["files"]


def test_a_damaged_checkpoint_is_never_exported(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(trained, here / "run")
    (run / "summary.json").unlink()
    (run / "checkpoints" / "step=90" / "adapter").mkdir(parents=True)
    flip(run / "checkpoints" / "step=10" / "adapter" / "adapter_model.safetensors")
    assert "the adapter of the newest checkpoint that is whole, step 5" in said(["export", "run", "a"], capsys)
    assert same(weights(here / "a"), weights(trained / "checkpoints" / "step=5" / "adapter"))
    for named in ("step=10", "step=10/state.ckpt", "step=10/adapter", "step=90"):
        assert "is damaged" in refused(["export", f"run/checkpoints/{named}", "b"], capsys)
    flip(run / "checkpoints" / "step=5" / "adapter" / "adapter_model.safetensors")
    assert main(["export", "run", "b"]) == 2
    assert "every checkpoint of" in capsys.readouterr().err
    assert not (here / "b").exists()


def test_a_run_that_went_on_after_its_summary_gives_its_newest_checkpoint(trained: Path, here: Path) -> None:
    run = shutil.copytree(trained, here / "run")
    (run / "summary.json").write_text(json.dumps({"steps": 5}))
    assert export.find_adapter(run)[0] == run / "checkpoints" / "step=10" / "adapter"
    (run / "summary.json").write_text("{")
    with pytest.raises(UsageError, match=r"summary\.json cannot be read"):
        export.find_adapter(run)


def current_umask() -> int:
    (here := os.umask(0), os.umask(here))
    return here


def test_export_replaces_an_earlier_export_only_and_only_if_forced(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(["export", str(trained), "out"], capsys)
    assert "exists already: choose another directory, or add --force" in refused(["export", str(trained / "checkpoints/step=5"), "out"], capsys)
    assert same(weights(here / "out"), weights(trained / "adapter"))
    said(["export", str(trained / "checkpoints/step=5"), "out", "--force"], capsys)
    assert same(weights(here / "out"), weights(trained / "checkpoints/step=5/adapter"))
    (here / "mine").mkdir()
    (here / "mine" / "thesis.tex").touch()
    assert "is not an earlier export" in refused(["export", str(trained), "mine", "--force"], capsys)
    said(["export", str(trained), "out", "--force", "--merge"], capsys)
    assert (here / "out" / "config.json").is_file()
    assert not (here / "out" / "adapter_config.json").exists()
    assert sorted(path.name for path in here.iterdir()) == ["mine", "out"]


def test_export_says_in_its_marker_where_it_came_from(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(["export", str(trained / "checkpoints/step=5"), "out"], capsys)
    marker = json.loads((here / "out" / export.MARKER).read_text())
    assert (marker["source"], marker["step"]) == (str(trained / "checkpoints/step=5/adapter"), 5)
    assert sorted(marker["files"]) == sorted(path.name for path in (here / "out").iterdir() if path.name != export.MARKER)


@pytest.mark.parametrize("words", [[], ["--merge"]])
def test_others_may_read_what_the_umask_lets_them(words: list[str], trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = 0o666 & ~current_umask()
    assert {path.stat().st_mode & 0o777 for path in (trained / "adapter").iterdir()} == {usual}
    said(["export", str(trained), "out", *words], capsys)
    assert {path.stat().st_mode & 0o777 for path in (here / "out").iterdir() if path.name != export.MARKER} == {usual}


def test_force_never_replaces_what_people_or_runs_keep(trained: Path, bloom: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run = shutil.copytree(bloom, here / "model"), shutil.copytree(trained, here / "run")
    said(["export", "run", "out", "--merge"], capsys)
    (here / "out" / "notes").mkdir()
    (here / "out" / "notes" / "README.md").touch()
    said(["export", "run", "merged", "--merge"], capsys)
    said(["export", "run", "run/exported"], capsys)
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    for words, sentence in (
        (["model", "--merge", "--model", str(model)], "is not an earlier export"),
        (["out", "--merge"], "holds notes, which export did not write"),
        (["merged", "--merge", "--model", "merged"], "holds the model itself"),
        (["run/adapter"], f"lies in the run {run}"),
        (["run/exported"], f"lies in the run {run}"),
        (["run"], f"lies in the run {run}"),
    ):
        assert main(["export", "run", *words, "--force"]) == 2
        assert sentence in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


@pytest.mark.parametrize("words", [[], ["--merge"]])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    words: list[str], trained: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(disk.f_bavail * disk.f_bsize - 8192))
    assert main(["export", str(trained), str(small_disk / "out"), *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{small_disk / 'out'}" in err
    assert "cannot be written" in err
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_damaged_adapter_leaves_nothing(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = shutil.copytree(trained / "adapter", here / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"x" * 100)
    for words in ([], ["--merge"]):
        assert "is not a whole safetensors file" in refused(["export", "broken", "out", *words], capsys)
    assert [path.name for path in here.iterdir()] == ["broken"]


def test_a_model_that_has_moved_is_given_with_model(trained: Path, bloom: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(trained, here / "run")
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"path": "/gone/model"}}))
    assert "the adapter is for the model /gone/model, which is not here: give it with --model" in refused(["export", "run", "out"], capsys)
    said(["export", "run", "out", "--model", str(bloom)], capsys)
    assert json.loads((here / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(bloom)


def test_export_in_another_dtype(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(["export", str(trained), "out", "--dtype", "bfloat16"], capsys)
    original = weights(trained / "adapter")
    assert same(weights(here / "out"), {name: value.bfloat16() for name, value in original.items()})


def test_a_merged_model_computes_what_model_and_adapter_do(trained: Path, bloom: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(["export", str(trained), "out", "--merge"], capsys)
    assert "merging loads the whole model: " in text
    assert "without a tokenizer, because the model has none" in text
    merged = AutoModelForCausalLM.from_pretrained(here / "out").eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bloom), trained / "adapter").eval()
    plain = AutoModelForCausalLM.from_pretrained(bloom).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours, theirs, other = merged(ids).logits, adapted(ids).logits, plain(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, other, atol=1e-2)
    assert [path.name for path in here.iterdir()] == ["out"]


@pytest.mark.parametrize(("call", "sentence"), [(3, "merging changes logits by"), (4, "the merged model would not load as it is")])
def test_a_merged_model_that_computes_something_else_is_not_written(
    call: int, sentence: str, trained: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, calls = export._probe, []

    def drifting(model: torch.nn.Module) -> torch.Tensor:
        calls.append(1)
        return probe(model) * (1.5 if len(calls) == call else 1)

    monkeypatch.setattr(export, "_probe", drifting)
    with pytest.raises(UsageError, match=rf"{sentence}.* nothing was written"):
        export.main([str(trained), "out", "--merge"])
    assert list(here.iterdir()) == []


def test_the_parser_takes_options_and_words_in_any_order() -> None:
    made = Parser("x", "")
    made.add_argument("first")
    made.add_argument("words", nargs="*")
    made.add_argument("--flag", action="store_true")
    given = made.read(["a", "--flag", "b=1", "c=2"])
    assert (given.first, given.words, given.flag) == ("a", ["b=1", "c=2"], True)
