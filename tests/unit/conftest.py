"""What the tests of the training half share; see ``stand_in``."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

import swarmtune
from swarmtune.train.documents import python_topics
from tests.unit.stand_in import StandInSwarm, stand_in

WORDS = 61
"""Words of the stand-in's vocabulary."""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A barrier of two threads costs far more than a tiny matrix product where other tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    seen = sorted({word for item in python_topics() for word in item.text.split() if word.isalpha()})[:WORDS]
    vocabulary = {word: index for index, word in enumerate(["<unk>", "</s>", "<pad>", *seen])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=len(vocabulary), hidden_size=16, n_layer=2, n_head=2)).save_pretrained(folder)
    return folder


@pytest.fixture
def swarm(monkeypatch: pytest.MonkeyPatch) -> list[StandInSwarm]:
    made: list[StandInSwarm] = []

    def make(*args: object, **kwargs: object) -> StandInSwarm:
        made.append(StandInSwarm())
        return made[-1]

    monkeypatch.setitem(vars(swarmtune), "LocalSwarm", make)
    monkeypatch.setitem(vars(swarmtune), "connect", make)
    monkeypatch.setitem(vars(swarmtune), "load_causal_lm", stand_in)
    return made


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", folder], check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)
