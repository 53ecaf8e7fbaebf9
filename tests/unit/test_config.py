import inspect
from pathlib import Path

import pytest
import yaml

import conf
from swarmtune import data_schema, schema
from swarmtune.config import compose, load_config, load_saved, options, resolve_path, save_yaml, to_plain
from swarmtune.data_schema import Format
from swarmtune.errors import UsageError
from swarmtune.schema import Config, Dtype, Quantize
from swarmtune.train.library_keys import check_trainer_flags, peft_config, trainer_flags

CONF = Path(conf.__file__).parent
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and any(path.glob("*.yaml")))
RECIPE = "recipe=lora_bloom"
NEEDS = {
    ("swarm", "join"): ["swarm.initial_peers=[/ip4/127.0.0.1/tcp/1/p2p/x]"],
    ("data", "dataset"): [f"data.path={CONF}"],
    ("adapter", "saved"): [f"adapter.path={CONF}"],
}
"""Options that stand for something only the user can give."""


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in GROUPS for option in options(group)])
def test_every_yaml_becomes_a_checked_config(group: str, option: str) -> None:
    words = [f"{group}={option}", *NEEDS.get((group, option), [])]
    found = load_config(words if group == "recipe" else [RECIPE, *words])
    assert isinstance(found, Config)
    if option != "saved":
        peft_config(found.adapter)


def test_every_field_of_the_schema_is_documented() -> None:
    source = inspect.getsource(schema) + "\n\n\n" + inspect.getsource(data_schema)
    for name in ("ModelConfig", "DataConfig", "SwarmConfig", "OptimizerConfig", "LoggerConfig", "CallbacksConfig", "Config"):
        lines = source.split(f"class {name}:")[1].split("\n\n\n")[0].splitlines()
        fields = [index for index, line in enumerate(lines) if line.startswith("    ") and line[4].isalpha() and ": " in line and "def " not in line]
        assert fields
        assert all(lines[index + 1].startswith('    """') for index in fields), name


SENTENCES = {
    "": "say which recipe to run, such as recipe=lora_bloom",
    "recipe=lora_blom": f"there is no recipe 'lora_blom'; there are: {', '.join(options('recipe'))}; did you mean lora_bloom?",
    f"{RECIPE} trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches must be above 0, got 0",
    f"{RECIPE} trainer.precision=16-true": "trainer.precision=16-true is not supported: adapters do not learn in float16; use 16-mixed",
    f"{RECIPE} trainer.precision=64-true": "trainer.precision=64-true is not supported: adapters are float32 (32-true) or lower",
    f"{RECIPE} optimizer.lr=inf": "optimizer.lr must be a finite number above 0, got inf",
    f"{RECIPE} data.split=test": "data.split needs data=PATH or ID",
    f"{RECIPE} data.streaming=true": "data.streaming needs data=PATH or ID",
    f"{RECIPE} data=org/x data.split=train[:10]": "data.split=train[:10]: this value cannot be read",
    f"{RECIPE} data=org/x data.split='train[:10]'": "data.split must be the name of a split, got 'train[:10]'",
    f"{RECIPE} data=org/x data.validation_split=train": "data.validation_split must be another split than data.split, got 'train' for both",
    f"{RECIPE} data=org/x data.validation_split=a data.validation_path={CONF}": "data.validation_split and data.validation_path exclude each other",
    f"{RECIPE} data=org/x data.validation_split=a data.validation_fraction=0.1": "data.validation_fraction says nothing beside data.validation_split",
    f"{RECIPE} data=org/x data.text_template={{a.b}}": "data.text_template must hold names of columns in braces",
    f"{RECIPE} data=org/x data.text_template={{a!r}}": "data.text_template must hold names of columns in braces",
    f"{RECIPE} data=org/x data.text_template={{a": "data.text_template cannot be read",
    f"{RECIPE} data=org/x data.text_template=plain": "data.text_template must hold names of columns in braces",
    f"{RECIPE} data=org/x data.text_template={{a}} data.text_column=b": "data.text_column says nothing beside data.text_template",
    f"{RECIPE} data=org/x data.streaming=true trainer.max_steps=-1": "data.streaming needs trainer.max_steps: a stream has no end",
    f"{RECIPE} data=org/x data.streaming=true data.num_workers=2": "data.num_workers must be 0 or 1 for a stream, got 2",
    f"{RECIPE} data.shuffle_windows=9": "data.shuffle_windows needs data.streaming=true",
    f"{RECIPE} data.validation_windows=0": "data.validation_windows must be at least 1, got 0",
    f"{RECIPE} data.cache=false data.cache_dir=/x": "data.cache_dir says nothing beside data.cache=false",
    f"{RECIPE} data.format=chat": "data.format=chat needs data=PATH or ID, or data=python_questions: python_topics is no such data",
    "recipe=lora_chat data=python_topics": "data.format=chat needs data=PATH or ID, or data=python_questions: python_topics is no such data",
    "recipe=lora_classify data=python_questions": "data.format=labels needs data=PATH or ID, or data=python_packages: python_questions is no such",
    f"{RECIPE} data.train_on=everything": "data.train_on needs data.format=chat: it says nothing about data.format=text",
    f"{RECIPE} data.too_long=drop": "data.too_long needs data.format=chat or data.format=labels: it says nothing about data.format=text",
    "recipe=lora_chat data.messages_column=x": "data.messages_column needs data=PATH or ID: it says nothing about the texts that come with Python",
    "recipe=lora_chat data=org/x data.text_column=x": "data.text_column needs data.format=text or data.format=labels",
    "recipe=lora_chat data=org/x data.prompt_column=q": "data.prompt_column and data.completion_column go together: give both, or neither",
    "recipe=lora_chat data=org/x data.prompt_column=q data.completion_column=a data.messages_column=m": "data.messages_column says nothing beside",
    f"recipe=lora_chat data.chat_template=x data.chat_template_file={CONF}/config.yaml": "data.chat_template_file says nothing beside data.ch",
    "recipe=lora_chat data.chat_template_file=/no/such.jinja": "data.chat_template_file: no such file or directory: /no/such.jinja",
    "recipe=lora_chat data.chat_template_file=gone": "data.chat_template_file: no such file or directory: gone",
    "recipe=lora_chat data.packing=yes": "data.packing must be one of auto, always, never, got",
    "recipe=lora_chat data.train_on=prompts": "data.train_on must be one of completions, everything, got 'prompts'",
    "recipe=lora_classify data=org/x data.label_names=[a,a]": "data.label_names must list two different classes or more, got ['a', 'a']",
    "recipe=lora_classify data=org/x data.streaming=true": "data.label_names must be given for a stream",
    f"{RECIPE} data=/no/*.jsonl": "data.path: no file matches /no/*.jsonl",
    f"{RECIPE} data=notes.jsonl.gz": "data: no such file or directory: notes.jsonl.gz",
    f"{RECIPE} data.validation_path=/no/such.csv": "data.validation_path: no such file or directory: /no/such.csv",
    f"{RECIPE} model=": "model.path must not be empty",
    f"{RECIPE} adapter=loha adapter.rank_dropout=0.1": "rank_dropout=0.1 of LoHaConfig is not supported, because its mask comes from global random "
    "numbers and a recomputed one would differ: set rank_dropout=0",
    f"{RECIPE} adapter=deep_prompts adapter.num_tokens=0": "num_tokens of deep prompts must be an integer from 1 to 16384, got 0",
    f"{RECIPE} adapter=bitfit adapter.parameter=[a]": "there is no key adapter.parameter; did you mean adapter.parameters?",
    f"{RECIPE} adapter.peft_type=OSF": "adapters of type OSF are not supported, because it takes the body's weights apart and trains parts of them",
    f"{RECIPE} trainer.devices=2": "trainer.devices=2 is not supported: training is one process on one device (the servers do the work); use 1",
    f"{RECIPE} data.batch_sise=4": "there is no key data.batch_sise; did you mean data.batch_size?",
    f"{RECIPE} +data.batch_sise=4": "there is no key data.batch_sise; did you mean data.batch_size?",
    f"{RECIPE} datas.batch_size=4": "there is no key datas",
    f"{RECIPE} data.batch_size=four": "data.batch_size must be a whole number, got 'four'",
    f"{RECIPE} data.batch_size=2.5": "data.batch_size must be a whole number, got 2.5",
    f"{RECIPE} data.batch_size=true": "data.batch_size must be a whole number, got True",
    f"{RECIPE} data.batch_size=0": "data.batch_size must be at least 1, got 0",
    f"{RECIPE} data.batch_size=null": "data.batch_size must be a whole number, got None",
    f"{RECIPE} data.validation_fraction=1": "data.validation_fraction must be between 0 and 1, got 1.0",
    f"{RECIPE} data.text_column=12": "data.text_column must be text, got 12 (quote it",
    f"{RECIPE} optimizer.lr=-1": "optimizer.lr must be a finite number above 0, got -1.0",
    f"{RECIPE} optimizer.lr=nan": "optimizer.lr must be a finite number above 0, got nan",
    f"{RECIPE} optimizer.schedule=cosin": "optimizer.schedule must be one of cosine, linear, constant, got 'cosin'; did you mean cosine?",
    f"{RECIPE} optimizer=adam": "optimizer must be a group of keys, got 'adam'",
    f"{RECIPE} seed=-1": "seed must be at least 0",
    f"{RECIPE} swarm=jion": "there is no swarm 'jion'; there are: join, local; did you mean join?",
    f"{RECIPE} swarm=join": "swarm.initial_peers must list at least one server",
    f"{RECIPE} swarm.initial_peers=[x]": "swarm.initial_peers needs swarm=join",
    f"{RECIPE} swarm.spans=[248]": "swarm.spans[0] must be text, got 248 (quote it",
    f"{RECIPE} swarm.spans=[3:3]": "swarm.spans: a block span must satisfy 0 <= start < stop, got 3:3",
    f"{RECIPE} swarm.dtype=fp8": "swarm.dtype must be one of auto, float32, bfloat16, float16, got 'fp8'",
    f"{RECIPE} swarm.quantize=int4": "swarm.quantize must be one of none, int8, nf4, got 'int4'",
    f"{RECIPE} swarm=join swarm.initial_peers=[x] swarm.quantize=int8": "swarm.quantize needs swarm=local",
    f"{RECIPE} trainer.max_step=3": "there is no key trainer.max_step; did you mean trainer.max_steps?",
    f"{RECIPE} trainer.max_steps=many": "trainer.max_steps must be int, got 'many'",
    f"{RECIPE} trainer.max_steps=-2": "trainer.max_steps must be -1 (no limit) or at least 0, got -2",
    f"{RECIPE} trainer.logger=true": "trainer.logger is set by swarmtune",
    f"{RECIPE} adapter.lora_alhpa=3": "there is no key adapter.lora_alhpa; did you mean adapter.lora_alpha?",
    f"{RECIPE} adapter.r=eight": "adapter.r must be int, got 'eight'",
    f"{RECIPE} adapter.r=0": "adapter.r must be at least 1, got 0",
    f"{RECIPE} adapter.peft_type=LORE": "there is no adapter.peft_type 'LORE'; did you mean LORA?",
    f"{RECIPE} adapter=/no/such": "adapter: no such directory: /no/such",
    f"{RECIPE} model=poket_bloom": "there is no model 'poket_bloom'; there are: pocket_bloom, pocket_llama; did you mean",
    f"{RECIPE} model=./missing": "model: no such directory: ./missing",
    f"{RECIPE} model=/no/such/model": "model: no such directory: /no/such/model",
    f"{RECIPE} model=~/no-such-model": "model: no such directory: ~/no-such-model",
    f"{RECIPE} model=a/b/c": "model: no such directory: a/b/c",
    f"{RECIPE} model.path=/no/such/model": "model: no such directory: /no/such/model",
    f"{RECIPE} model=pkg://swarmtune/nothing": "the package swarmtune has no folder nothing",
    f"{RECIPE} model=pkg://nopackage/x": "there is no Python package nopackage",
    f"{RECIPE} data=/no/such.jsonl": "data: no such file or directory: /no/such.jsonl",
    f"{RECIPE} data=notes.jsonl": "data: no such file or directory: notes.jsonl",
    f"{RECIPE} seed=1,2": "seed=1,2: one run takes one value",
    f"{RECIPE} seed=[1": "seed=[1: this value cannot be read",
    f"{RECIPE} seed": "expected key=value, got 'seed'",
    f"{RECIPE} ~trainer.max_stepz": "there is no key trainer.max_stepz to remove",
}


@pytest.mark.parametrize("words", SENTENCES)
def test_a_wrong_word_is_refused_in_one_sentence(words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(words.split())
    assert SENTENCES[words] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_reach_their_keys() -> None:
    words = [
        "optimizer.lr=5e-4",
        "swarm.spans=[0:2,2:6]",
        "swarm.dtype=bfloat16",
        "swarm.quantize=nf4",
        "trainer.max_steps=7",
        "adapter.r=4",
        "adapter.use_rslora=true",
    ]
    found = load_config([RECIPE, *words, "trainer.limit_val_batches=0.5", "data.batch_size=1e1", "~trainer.gradient_clip_val"])
    assert found.optimizer.lr == 5e-4
    assert found.swarm.spans == ("0:2", "2:6")
    assert found.swarm.dtype is Dtype.BFLOAT16
    assert found.swarm.quantize is Quantize.NF4
    assert found.trainer["max_steps"] == 7
    assert found.trainer["limit_val_batches"] == 0.5
    assert "gradient_clip_val" not in found.trainer
    assert found.data.batch_size == 10
    adapter = peft_config(found.adapter)
    assert (adapter.r, adapter.use_rslora, adapter.target_modules) == (4, True, "all-linear")


def test_the_recipe_wins_over_defaults_and_the_command_line_over_both() -> None:
    assert load_config([RECIPE]).optimizer.lr == 5e-3
    assert load_config(["optimizer.lr=1e-5", RECIPE]).optimizer.lr == 1e-5


def test_a_directory_with_odd_characters_is_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "a model (v=1), [x] {y} ${z} 'q'"
    folder.mkdir()
    found = load_config([RECIPE, f"model={folder}", f"data={folder}", f"run_dir={folder}/run, 1"])
    assert found.model.path == found.data.path == str(folder)
    assert found.data.source.value == "dataset"
    assert found.run_dir == f"{folder}/run, 1"


def test_a_recipe_keeps_its_format_when_it_is_given_data() -> None:
    assert load_config(["recipe=lora_chat", "data=org/x"]).data.format is Format.CHAT
    assert load_config(["recipe=lora_classify", "data=org/x", "data.label_names=[a,b]"]).data.label_names == ("a", "b")
    assert load_config(["data=python_questions", RECIPE]).data.format is Format.CHAT
    template = r"{% for m in messages %}[{{ m.content }}]\n{% endfor %}"
    assert load_config(["recipe=lora_chat", f"data.chat_template={template}"]).data.chat_template == template.replace(r"\n", "\n")


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert load_config([RECIPE, "model=model"]).model.path == str(tmp_path / "model")
    assert load_config([RECIPE, "adapter=model"]).adapter == {"path": str(tmp_path / "model")}


def test_a_hub_id_stays_a_hub_id() -> None:
    assert load_config([RECIPE, "model=bigscience/bloom-560m"]).model.path == "bigscience/bloom-560m"
    assert load_config([RECIPE, "model=gpt2"]).model.path == "gpt2"
    assert load_config([RECIPE, "data=org/some.data"]).data.path == "org/some.data"


def test_our_conf_is_used_in_a_directory_with_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("seed: 99")
    monkeypatch.chdir(tmp_path)
    assert load_config([RECIPE]).seed == 0


def test_a_saved_config_holds_what_was_resolved(tmp_path: Path) -> None:
    found = load_config([RECIPE, "swarm.spans=[0:3,3:6]"])
    save_yaml(found, tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == to_plain(found)


def test_the_saved_config_of_a_joined_run_does_not_claim_what_its_servers_compute_in(tmp_path: Path) -> None:
    found = load_config([RECIPE, "swarm=join", "swarm.initial_peers=[/ip4/127.0.0.1/tcp/1/p2p/x]"])
    save_yaml(found, tmp_path / "config.yaml")
    kept = yaml.safe_load((tmp_path / "config.yaml").read_text())["swarm"]
    assert not kept.keys() & {"dtype", "quantize", "servers", "spans", "threads"}
    assert kept["kind"] == "join"
    assert load_saved(tmp_path / "config.yaml") == found
    changed = load_saved(tmp_path / "config.yaml", ["swarm.kind=local", "swarm.initial_peers=[]", "swarm.servers=3"])
    assert changed.swarm.servers == 3


def test_an_unquoted_span_in_yaml_is_not_taken_for_text() -> None:
    with pytest.raises(UsageError, match="must be text"):
        compose("config", [RECIPE, "swarm.spans=[248]"], Config)


def test_trainer_flags_are_those_of_lightning() -> None:
    from lightning.pytorch import Trainer

    assert trainer_flags().keys() == inspect.signature(Trainer.__init__).parameters.keys() - {"self"}


def test_a_trainer_flag_may_be_of_any_type_in_its_annotation() -> None:
    check_trainer_flags({"val_check_interval": 0.5, "devices": "1", "precision": "bf16-mixed", "max_time": {"hours": 1}, "fast_dev_run": 2})


def test_resolve_path_finds_a_folder_of_a_package() -> None:
    assert resolve_path("pkg://conf/model") == str(CONF / "model")
