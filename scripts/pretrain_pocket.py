"""Pretrain the pocket BLOOM that swarmtune ships, on text that comes with Python itself.

``python scripts/pretrain_pocket.py`` reads the running interpreter's standard library (parsed, never imported), trains a
byte-level BPE tokenizer and a small ``BloomForCausalLM`` on the CPU, and writes one directory that ``from_pretrained``
loads: weights in bf16, tokenizer, loss curve, and a model card whose figures are the ones measured here.

``pydoc_data.topics`` is the fine-tuning text of the first run. Paragraphs that share 13 words in a row with it are
dropped, and the script stops if any such sequence is left.
"""

import argparse
import ast
import csv
import hashlib
import io
import math
import platform
import re
import shlex
import sysconfig
import tempfile
import time
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "swarmtune" / "assets" / "pocket_bloom"
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
OVERLAP_WORDS = 13
"""A run of this many words shared with the topics counts as a copy (the n-gram length of GPT-3's decontamination)."""
HELD_OUT_PERCENT = 2
MEASUREMENTS = 25
"""How often the held-out loss is taken in one run, beside the one before the first step."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line chooses; one option per field."""

    output: Path = DEFAULT_OUTPUT
    steps: int = 5000
    seed: int = 0
    batch: int = 8
    sequence_tokens: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    source_percent: int = 30
    vocabulary: int = 4096
    hidden: int = 192
    layers: int = 6
    heads: int = 4
    threads: int = 2
    precision: str = "bf16"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "sequence_tokens", "vocabulary", "hidden", "layers", "heads", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.hidden % self.heads:
            raise ValueError(f"--hidden must be a multiple of --heads, got {self.hidden} and {self.heads}")
        if not 0 <= self.source_percent <= 100:
            raise ValueError(f"--source-percent must be 0 to 100, got {self.source_percent}")
        if self.output.exists() and any(self.output.iterdir()) and not (self.output / "pretraining.csv").exists():
            raise ValueError(f"--output {self.output} holds other things, and would be replaced: choose another one")

    def command(self) -> str:
        """Give the command that repeats the run, every option spelled out but the place of the output."""
        options = [(f"--{f.name.replace('_', '-')}", str(getattr(self, f.name))) for f in fields(self)]
        return shlex.join(["python", "scripts/pretrain_pocket.py", *(word for pair in options[1:] for word in pair)])


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts to train on and texts held out, split by file, and what it took to make them."""

    train: list[str]
    held_out: list[str]
    files: int
    dropped_paragraphs: int
    prose_chars: int
    source_chars: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row of ``pretraining.csv``; losses are nats per token, ``train_loss`` is the mean since the row before."""

    step: int
    tokens: int
    seconds: float
    learning_rate: float
    train_loss: float
    held_out_loss: float


def main() -> None:
    """Make the corpus, the tokenizer and the model, then put the directory in place in one move."""
    settings = parse_arguments()
    console = Console(soft_wrap=True, highlight=False)
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(settings.seed)
    settings.output.parent.mkdir(parents=True, exist_ok=True)

    corpus = build_corpus(settings.source_percent)
    console.print(f"{corpus.files} files: {corpus.prose_chars:,} characters of prose, {corpus.source_chars:,} of source")
    tokenizer = train_tokenizer(corpus.train, settings)
    train_N, held_out_N = pack(corpus.train, tokenizer), pack(corpus.held_out, tokenizer)
    console.print(f"{len(train_N):,} tokens to train on, {len(held_out_N):,} held out")

    model = BloomForCausalLM(model_config(settings, tokenizer))
    measurements = train(model, train_N, held_out_N, settings, console)

    with tempfile.TemporaryDirectory(dir=settings.output.parent, prefix=".pocket-") as staging:
        fresh = Path(staging) / "new"
        tokenizer.save_pretrained(fresh)
        model.to(torch.bfloat16).save_pretrained(fresh)
        stored = BloomForCausalLM.from_pretrained(fresh, dtype=torch.float32)
        stored_loss = evaluate(stored, held_out_N, settings)
        write_csv(fresh / "pretraining.csv", measurements)
        plot_curve(fresh / "curve.png", measurements)
        card = model_card(settings, corpus, measurements, stored, stored_loss, len(train_N), len(held_out_N))
        (fresh / "README.md").write_text(card, encoding="utf-8")
        if settings.output.exists():
            settings.output.rename(Path(staging) / "old")
        fresh.rename(settings.output)
    console.print(f"{settings.output}: held-out perplexity {math.exp(stored_loss):.2f} as stored")


def parse_arguments() -> Settings:
    """Read the command line; a value out of range ends the program with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Settings()
    for field in fields(Settings):
        default = getattr(defaults, field.name)
        choices = ("bf16", "fp32") if field.name == "precision" else None
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(default), default=default, choices=choices, help=f"[{default}]"
        )
    try:
        return Settings(**vars(parser.parse_args()))
    except ValueError as error:
        parser.error(str(error))


# The corpus


def build_corpus(source_percent: int) -> Corpus:
    """Collect the standard library's prose, and the source of ``source_percent`` of its files, without the topics.

    Raises:
        RuntimeError: a sequence of ``OVERLAP_WORDS`` words of the topics is still in the corpus.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    topics = topic_sequences(library / "pydoc_data" / "topics.py")
    train: list[str] = []
    held_out: list[str] = []
    files = dropped = prose_chars = source_chars = 0
    for name, source in library_sources(library):
        prose, prose_dropped = without_topics(prose_of(source), topics)
        wants_source = "test" not in name and stable_percent(f"source {name}") < source_percent
        code, code_dropped = without_topics(source, topics) if wants_source else ("", 0)
        side = held_out if stable_percent(name) < HELD_OUT_PERCENT else train
        side.extend(text for text in (prose, code) if text)
        files, dropped = files + 1, dropped + prose_dropped + code_dropped
        prose_chars, source_chars = prose_chars + len(prose), source_chars + len(code)
    for text in (*train, *held_out):
        for _, sequence in word_sequences(words_of(text)):
            if sequence in topics:
                raise RuntimeError(f"text of pydoc_data.topics is in the corpus: {' '.join(sequence)!r}")
    return Corpus(train, held_out, files, dropped, prose_chars, source_chars)


def library_sources(library: Path) -> Iterator[tuple[str, str]]:
    """Yield (path within the library, text) of each file that parses, in a fixed order.

    Left out: ``pydoc_data``, which is the fine-tuning text, installed packages, and files that record how and where this
    Python was built.
    """
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if re.match(r"pydoc_data/|(site|dist)-packages/|_sysconfigdata|config-", name):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings(action="ignore"):
                ast.parse(source)
        except (SyntaxError, ValueError):  # the test suite keeps broken files on purpose
            continue
        yield name, source


def prose_of(source: str) -> str:
    """Give the docstrings of a module and the comments that stand on lines of their own, in the order of the file."""
    pieces: list[tuple[int, str]] = []
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if docstring := ast.get_docstring(node):
                pieces.append((node.body[0].lineno, docstring))
    comments = [
        (token.start[0], token.string.lstrip("#! ").rstrip())
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
    ]
    for _, block in groupby(enumerate(comments), key=lambda item: item[1][0] - item[0]):
        lines = [comment for _, comment in block]
        text = "\n".join(line for _, line in lines).strip()
        if len(words_of(text)) >= 6:  # shorter ones are mostly commented-out code and labels
            pieces.append((lines[0][0], text))
    return "\n\n".join(text for _, text in sorted(pieces))


def topic_sequences(path: Path) -> set[tuple[str, ...]]:
    """Give every run of ``OVERLAP_WORDS`` words of the topics, read as data."""
    assignment = next(node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign))
    texts: Iterable[str] = ast.literal_eval(assignment.value).values()
    return {sequence for text in texts for _, sequence in word_sequences(words_of(text))}


def words_of(text: str) -> list[str]:
    """Give the words in lower case, so that wrapping and markup do not hide a copy."""
    return re.findall(r"\w+", text.lower())


def word_sequences(words: list[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (index of the first word, run) for each run of ``OVERLAP_WORDS`` words."""
    for start in range(len(words) - OVERLAP_WORDS + 1):
        yield start, tuple(words[start : start + OVERLAP_WORDS])


def without_topics(text: str, topics: set[tuple[str, ...]]) -> tuple[str, int]:
    """Give the text without the paragraphs that a run shared with the topics touches, and how many those were."""
    paragraphs = re.split(r"\n\s*\n", text)
    owned_words = [(word, owner) for owner, paragraph in enumerate(paragraphs) for word in words_of(paragraph)]
    touched = {
        owner
        for start, sequence in word_sequences([word for word, _ in owned_words])
        if sequence in topics
        for _, owner in owned_words[start : start + OVERLAP_WORDS]
    }
    return "\n\n".join(p for index, p in enumerate(paragraphs) if index not in touched), len(touched)


def stable_percent(name: str) -> float:
    """Give a number in 0:100 that depends on the name alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32 * 100


# The tokenizer


def train_tokenizer(texts: list[str], settings: Settings) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE; every string can be encoded, so there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Give one stream of token ids (N,), each text between ``<s>`` and ``</s>``."""
    encoded = tokenizer([f"{BOS}{text}{EOS}" for text in texts], add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in ids])


# The model


def model_config(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> BloomConfig:
    """Describe the model; no dropout, and the embedding is the output layer too, as in every BLOOM."""
    return BloomConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        n_layer=settings.layers,
        n_head=settings.heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train(
    model: BloomForCausalLM, train_N: Tensor, held_out_N: Tensor, settings: Settings, console: Console
) -> list[Measurement]:
    """Train ``model`` in place with AdamW, warmup and a cosine to zero; give the losses along the way."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
    )
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    batches = sample_batches(train_N, settings)
    step_tokens = settings.batch * settings.sequence_tokens
    first_loss = evaluate(model, held_out_N, settings)
    measurements = [Measurement(0, 0, 0.0, 0.0, first_loss, first_loss)]
    losses: list[float] = []
    every = max(1, settings.steps // MEASUREMENTS)
    columns = (TextColumn("pretraining"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]} tok/s"))
    started = time.monotonic()
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("pretraining", total=settings.steps, rate="-")
        for step in range(1, settings.steps + 1):
            losses.append(train_step(model, next(batches), optimizer, settings))
            learning_rate = schedule.get_last_lr()[0]
            schedule.step()
            rate_tok_s = step * step_tokens / (time.monotonic() - started)
            progress.update(bar, advance=1, rate=f"{rate_tok_s:,.0f}")
            if step % every and step != settings.steps:
                continue
            held_out_loss = evaluate(model, held_out_N, settings)
            elapsed_s = time.monotonic() - started
            row = Measurement(
                step, step * step_tokens, round(elapsed_s, 1), learning_rate, sum(losses) / len(losses), held_out_loss
            )
            measurements.append(row)
            losses.clear()
            left_s = elapsed_s / step * (settings.steps - step)
            console.print(
                f"step {step}/{settings.steps}  train loss {row.train_loss:.3f}  held-out loss {held_out_loss:.3f}  "
                f"{rate_tok_s:,.0f} tok/s  {left_s / 60:.1f} min left"
            )
    return measurements


def train_step(model: BloomForCausalLM, tokens_BT: Tensor, optimizer: torch.optim.Optimizer, settings: Settings) -> float:
    """Take one step on one batch and give its loss."""
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
        loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def sample_batches(stream_N: Tensor, settings: Settings) -> Iterator[Tensor]:
    """Yield batches (B, T) for ever; each pass over the stream cuts it at other places, in another order."""
    length = settings.sequence_tokens
    while True:
        offset = int(torch.randint(length, ()))
        count = (len(stream_N) - offset) // length
        windows_NT = stream_N[offset : offset + count * length].view(count, length)
        yield from windows_NT[torch.randperm(count)].split(settings.batch)


@torch.no_grad()
def evaluate(model: BloomForCausalLM, stream_N: Tensor, settings: Settings) -> float:
    """Give the mean loss in nats per token over the whole stream, cut into sequences."""
    model.eval()
    count = len(stream_N) // settings.sequence_tokens
    windows_NT = stream_N[: count * settings.sequence_tokens].view(count, -1)
    total = 0.0
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
        for tokens_BT in windows_NT.split(settings.batch):
            total += model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss.item() * len(tokens_BT)
    return total / count
