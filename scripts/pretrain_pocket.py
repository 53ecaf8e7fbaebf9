"""Pretrain the pocket models that swarmtune ships, a BLOOM and a LLaMA, on text that comes with Python itself.

``python scripts/pretrain_pocket.py`` reads the running interpreter's standard library (parsed, never imported), trains a
byte-level BPE tokenizer and a small model (``--family bloom`` or ``llama``) on the CPU, and writes one directory that ``from_pretrained``
loads: weights in bf16, tokenizer, loss curve, and a model card whose figures are the ones measured here.

``pydoc_data.topics`` is the fine-tuning text of the first run. Paragraphs that share 13 words in a row with it are
dropped, and the script stops if any such run of words is left.
"""

import argparse
import ast
import csv
import hashlib
import math
import platform
import re
import shlex
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)
from transformers.utils import logging as transformers_logging

ASSETS = Path(__file__).resolve().parents[1] / "swarmtune" / "assets"
FAMILIES = {"bloom": "BLOOM", "llama": "LLaMA"}
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
VOCABULARY, HIDDEN, LAYERS, HEADS = 4096, 224, 4, 4
INTERMEDIATE, POSITIONS = 592, 2048
"""Of the LLaMA: width of its gated layers, and how far its rotary positions reach."""
SEQUENCE_TOKENS = 256
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
OVERLAP_WORDS = 13
"""A run of this many words shared with the topics counts as a copy (the length in GPT-3's decontamination)."""
HELD_OUT_PERCENT = 2
SOURCE_PERCENT = 30
"""Share of the library's files, tests aside, whose source is trained on besides their prose."""
MEASUREMENTS = 25
"""How often a run takes the held-out loss, besides once before the first step."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line chooses: one option per field."""

    family: str = "bloom"
    output: Path | None = None
    steps: int = 5000
    seed: int = 0
    threads: int = 2
    batch: int = 8
    learning_rate: float = 2e-3
    precision: str = "bf16"

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"--family must be one of {', '.join(FAMILIES)}, got {self.family}")
        for name in ("steps", "threads", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning-rate must be above 0, got {self.learning_rate}")
        if self.place.exists() and not (self.place / "pretraining.csv").is_file():
            raise ValueError(f"--output {self.place} exists and was not written by this script: choose another place")

    @property
    def place(self) -> Path:
        """Where the finished directory goes."""
        return self.output or ASSETS / f"pocket_{self.family}"

    def command(self) -> str:
        """Give the command that repeats the run, with every option but the place of the output."""
        options = [(option_of(name), str(value)) for name, value in asdict(self).items() if name != "output"]
        return shlex.join(["python", "scripts/pretrain_pocket.py", *(word for option in options for word in option)])


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts to train on and texts held out, split by file, and what was read and dropped for them."""

    train: list[str]
    held_out: list[str]
    files: int
    prose_chars: int
    source_chars: int
    dropped_paragraphs: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row of ``pretraining.csv``. Losses are nats per token; ``train_loss`` is the mean since the row before."""

    step: int
    tokens: int
    seconds: float
    learning_rate: float
    train_loss: float
    held_out_loss: float


@dataclass(frozen=True, slots=True)
class Result:
    """What the finished run came to; ``stored_loss`` is held-out, of the weights as written in bf16."""

    parameters: int
    train_tokens: int
    held_out_tokens: int
    stored_loss: float


def main() -> None:
    """Make the corpus, the tokenizer and the model, then move the finished directory into place."""
    settings = parse_arguments()
    settings.place.parent.mkdir(parents=True, exist_ok=True)
    console = Console(soft_wrap=True, highlight=False)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(settings.seed)

    corpus = build_corpus(Path(sysconfig.get_path("stdlib")))
    console.print(f"{corpus.files:,} files, {corpus.prose_chars:,} characters of prose, {corpus.source_chars:,} of source")
    tokenizer = train_tokenizer(corpus.train)
    train_N, held_out_N = pack(corpus.train, tokenizer), pack(corpus.held_out, tokenizer)
    console.print(f"{len(train_N):,} tokens to train on, {len(held_out_N):,} held out")
    model = build_model(settings.family, tokenizer)
    measurements = train(model, train_N, held_out_N, settings, console)

    with tempfile.TemporaryDirectory(dir=settings.place.parent, prefix=".pocket-") as staging:
        fresh = Path(staging) / "new"
        tokenizer.save_pretrained(fresh)
        model.to(torch.bfloat16).save_pretrained(fresh)
        (fresh / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
        stored = AutoModelForCausalLM.from_pretrained(fresh, dtype=torch.float32)
        result = Result(stored.num_parameters(), len(train_N), len(held_out_N), evaluate(stored, held_out_N, settings))
        write_measurements(fresh / "pretraining.csv", measurements)
        plot_losses(fresh / "curve.png", measurements, FAMILIES[settings.family])
        (fresh / "README.md").write_text(model_card(settings, corpus, measurements, result), encoding="utf-8")
        if settings.place.exists():
            settings.place.rename(Path(staging) / "old")
        fresh.rename(settings.place)
    console.print(f"{settings.place}: held-out perplexity {math.exp(result.stored_loss):.1f} as stored")


def parse_arguments() -> Settings:
    """Read the command line; a value out of range ends the program with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        choices = {"precision": ("bf16", "fp32"), "family": tuple(FAMILIES)}.get(field.name)
        parser.add_argument(
            option_of(field.name),
            type=Path if field.name == "output" else field.type,
            default=field.default,
            choices=choices,
            help="default: %(default)s",
        )
    try:
        return Settings(**vars(parser.parse_args()))
    except ValueError as error:
        parser.error(str(error))


def option_of(field: str) -> str:
    """Give the command-line option of a field of `Settings`."""
    return f"--{field.replace('_', '-')}"


def build_corpus(library: Path) -> Corpus:
    """Collect the prose of the standard library, and the source of some of its files, without the topics.

    Raises:
        RuntimeError: a run of ``OVERLAP_WORDS`` words of the topics is still in the corpus.
    """
    topics = topic_runs(library / "pydoc_data" / "topics.py")
    train: list[str] = []
    held_out: list[str] = []
    files = prose_chars = source_chars = dropped_paragraphs = 0
    for name, source in library_sources(library):
        wants_source = "test" not in name and stable_percent(f"source of {name}") < SOURCE_PERCENT
        prose, prose_dropped = without_topics(prose_of(source), topics)
        code, code_dropped = without_topics(source if wants_source else "", topics)
        side = held_out if stable_percent(name) < HELD_OUT_PERCENT else train
        side.extend(text for text in (prose, code) if text.strip())
        files, dropped_paragraphs = files + 1, dropped_paragraphs + prose_dropped + code_dropped
        prose_chars, source_chars = prose_chars + len(prose), source_chars + len(code)
    for text in (*train, *held_out):
        if shared := topics.intersection(word_runs(words_of(text))):
            raise RuntimeError(f"text of pydoc_data.topics is in the corpus: {' '.join(shared.pop())!r}")
    return Corpus(train, held_out, files, prose_chars, source_chars, dropped_paragraphs)


def library_sources(library: Path) -> Iterator[tuple[str, str]]:
    """Yield (path in the library, text) of each file that parses, in a fixed order.

    Left out: ``pydoc_data``, which is the fine-tuning text; installed packages; and the files that record where and how
    this Python was built.
    """
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if re.match(r"pydoc_data/|(site|dist)-packages/|_sysconfigdata|config-", name):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            parse(source)
        except (SyntaxError, ValueError):  # the test suite keeps broken files on purpose
            continue
        yield name, source


def parse(source: str) -> ast.Module:
    """Parse without the warnings that the test suite's odd literals cause."""
    with warnings.catch_warnings(action="ignore"):
        return ast.parse(source)


def prose_of(source: str) -> str:
    """Give a module's docstrings and the comments that stand on lines of their own, in the order of the file."""
    pieces: list[tuple[int, str]] = []
    for node in ast.walk(parse(source)):
        if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
            pieces.append((node.body[0].lineno, docstring))
    for block in re.finditer(r"(?:^[ \t]*#.*\n)+", source, re.MULTILINE):
        comment = re.sub(r"^[ \t]*#+!? ?", "", block[0], flags=re.MULTILINE).strip()
        if len(words_of(comment)) >= 6:  # shorter ones are mostly labels and disabled code
            pieces.append((source.count("\n", 0, block.start()) + 1, comment))
    return "\n\n".join(text for _, text in sorted(pieces))


def topic_runs(path: Path) -> set[tuple[str, ...]]:
    """Give every run of ``OVERLAP_WORDS`` words in the topics, read as data."""
    assignment = next(node for node in parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign))
    return {run for text in ast.literal_eval(assignment.value).values() for run in word_runs(words_of(text))}


def words_of(text: str) -> list[str]:
    """Give the words in lower case, so that neither wrapping nor markup hides a copy."""
    return re.findall(r"\w+", text.lower())


def word_runs(words: list[str]) -> Iterator[tuple[str, ...]]:
    """Yield each run of ``OVERLAP_WORDS`` words; the index of a run is that of its first word."""
    return zip(*(words[start:] for start in range(OVERLAP_WORDS)), strict=False)


def without_topics(text: str, topics: set[tuple[str, ...]]) -> tuple[str, int]:
    """Give the text without the paragraphs that a run of the topics touches, and how many those were."""
    paragraphs = re.split(r"\n\s*\n", text)
    words = [(word, owner) for owner, paragraph in enumerate(paragraphs) for word in words_of(paragraph)]
    touched: set[int] = set()
    for start, run in enumerate(word_runs([word for word, _ in words])):
        if run in topics:
            touched.update(owner for _, owner in words[start : start + OVERLAP_WORDS])
    return "\n\n".join(text for owner, text in enumerate(paragraphs) if owner not in touched), len(touched)


def stable_percent(name: str) -> float:
    """Give a number in 0:100 that depends on the name alone, on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32 * 100


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE: it encodes every string, so there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Give one stream of token ids (N,), each text between ``<s>`` and ``</s>``."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([id_ for ids in encoded for id_ in (tokenizer.bos_token_id, *ids, tokenizer.eos_token_id)])


def build_model(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Initialise the model as transformers does; no dropout, and the embedding is the output layer."""
    common = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "tie_word_embeddings": True}
    common |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config: PretrainedConfig
    if family == "bloom":
        config = BloomConfig(n_layer=LAYERS, n_head=HEADS, hidden_dropout=0.0, attention_dropout=0.0, **common)
    else:
        layers = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2}
        config = LlamaConfig(**layers, intermediate_size=INTERMEDIATE, max_position_embeddings=POSITIONS, **common)
    return AutoModelForCausalLM.from_config(config)


def train(model: PreTrainedModel, train_N: Tensor, held_out_N: Tensor, settings: Settings, console: Console) -> list[Measurement]:
    """Train ``model`` in place with AdamW, warmup and a cosine to zero; give the losses along the way."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, settings.steps // 20), settings.steps)
    batches = sample_batches(train_N, settings.batch)
    first_loss = evaluate(model, held_out_N, settings)
    measurements = [Measurement(0, 0, 0.0, 0.0, math.nan, first_loss)]
    losses: list[float] = []
    tokens = 0
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    started_s = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=settings.steps)
        for step in range(1, settings.steps + 1):
            learning_rate = schedule.get_last_lr()[0]
            tokens_BT = next(batches)
            losses.append(train_step(model, tokens_BT, optimizer, settings))
            schedule.step()
            tokens, elapsed_s = tokens + tokens_BT.numel(), time.monotonic() - started_s
            progress.update(bar, advance=1, description=f"{tokens / elapsed_s:,.0f} tok/s")
            if step % max(1, settings.steps // MEASUREMENTS) and step != settings.steps:
                continue
            train_loss, held_out_loss = sum(losses) / len(losses), evaluate(model, held_out_N, settings)
            losses.clear()
            measurements.append(Measurement(step, tokens, elapsed_s, learning_rate, train_loss, held_out_loss))
            left_s = elapsed_s / step * (settings.steps - step)
            console.print(
                f"step {step}/{settings.steps}  train loss {train_loss:.3f}  held-out loss {held_out_loss:.3f}  "
                f"{tokens / elapsed_s:,.0f} tok/s  {left_s / 60:.1f} min left"
            )
    return measurements


def sample_batches(stream_N: Tensor, batch: int) -> Iterator[Tensor]:
    """Yield batches (B, T) for ever; each pass over the stream cuts it at other places and in another order."""
    while True:
        offset = int(torch.randint(SEQUENCE_TOKENS, ()))
        windows_NT = cut(stream_N[offset:])
        yield from windows_NT[torch.randperm(len(windows_NT))].split(batch)


def cut(stream_N: Tensor) -> Tensor:
    """Cut a stream of tokens into sequences (N, T), leaving out what is short of a sequence at the end."""
    return stream_N[: len(stream_N) // SEQUENCE_TOKENS * SEQUENCE_TOKENS].view(-1, SEQUENCE_TOKENS)


def train_step(model: PreTrainedModel, tokens_BT: Tensor, optimizer: torch.optim.Optimizer, settings: Settings) -> float:
    """Take one step on one batch and give its loss."""
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
        loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def evaluate(model: PreTrainedModel, stream_N: Tensor, settings: Settings) -> float:
    """Give the mean loss over the stream, cut into sequences, in nats per token."""
    model.eval()
    windows_NT = cut(stream_N)
    total = 0.0
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
        for tokens_BT in windows_NT.split(settings.batch):
            total += model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss.item() * len(tokens_BT)
    return total / len(windows_NT)


def write_measurements(path: Path, measurements: list[Measurement]) -> None:
    """Write the losses along the way as CSV, a column per field of `Measurement`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Measurement))
        writer.writerows([round(value, 8) for value in astuple(row)] for row in measurements)


def plot_losses(path: Path, measurements: list[Measurement], family: str) -> None:
    """Draw train and held-out loss over tokens."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    millions = [row.tokens / 1e6 for row in measurements]
    axes.plot(millions, [row.train_loss for row in measurements], label="train (mean since the point before)")
    axes.plot(millions, [row.held_out_loss for row in measurements], label="held out")
    axes.set(xlabel="tokens trained on (millions)", ylabel="loss (nats per token)", title=f"Pretraining the pocket {family}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def model_card(settings: Settings, corpus: Corpus, measurements: list[Measurement], result: Result) -> str:
    """Write the README of the model from what was measured."""
    last = measurements[-1]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers"))
    return f"""\
---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Pocket {FAMILIES[settings.family]}

A small {FAMILIES[settings.family]} of {result.parameters:,} parameters ({LAYERS} blocks, hidden size {HIDDEN}, {HEADS} heads, tied embeddings,
stored in bf16) with a byte-level BPE tokenizer of {VOCABULARY:,} tokens. It lets swarmtune's first run, its examples and its
tests work on a real pretrained model with nothing downloaded. This card was written by the script that trained the model.

## How it was made

```
{settings.command()}
```

{platform.python_implementation()} {platform.python_version()}, {packages}. {last.tokens:,} tokens in {last.step:,} steps of
{settings.batch} x {SEQUENCE_TOKENS} packed tokens, in {last.seconds:,.0f} s on {settings.threads} CPU threads ({settings.precision}).
AdamW, learning rate {settings.learning_rate:g} after a warmup of 5 % of the steps, then a cosine to zero. Another version of
Python has other text, and another processor rounds otherwise: elsewhere the command gives a similar model, not the same bits.

| held-out files | loss (nats per token) | perplexity |
|---|---|---|
| before training | {measurements[0].held_out_loss:.3f} | {math.exp(measurements[0].held_out_loss):,.1f} |
| after training | {last.held_out_loss:.3f} | {math.exp(last.held_out_loss):,.1f} |
| as stored, rounded to bf16 | {result.stored_loss:.3f} | {math.exp(result.stored_loss):,.1f} |

![Train and held-out loss over tokens](curve.png)

The figures behind the curve are in `pretraining.csv`.

## The text

{corpus.files:,} Python files of the standard library, its tests included, read as text:

| | |
|---|---|
| docstrings and comments | {corpus.prose_chars:,} characters |
| source of {SOURCE_PERCENT} % of the files, tests aside | {corpus.source_chars:,} characters |
| train split | {result.train_tokens:,} tokens ({last.tokens / result.train_tokens:.1f} passes) |
| held-out split, {HELD_OUT_PERCENT} % of the files by a hash of their path | {result.held_out_tokens:,} tokens |

`pydoc_data.topics`, the text that swarmtune fine-tunes on first, is not in it: {corpus.dropped_paragraphs} paragraphs that shared
{OVERLAP_WORDS} words in a row with it were dropped, and the script stops if one such run of words is left.

The text is part of CPython, under the [PSF License Agreement](https://docs.python.org/3/license.html); some modules carry further
permissive licences, listed on the same page.

## What it is not good for

Anything but trying out training and serving. It knows the vocabulary and layout of Python's documentation and little of their
sense: it states no facts, follows no instructions, writes no working code, and has seen next to nothing but English and Python.
"""


if __name__ == "__main__":
    main()
