"""The schema of a training run: what each key means, and which values it takes. ``config.py`` fills it from YAML files and words."""

from __future__ import annotations

import enum
import math
import re
import string
from dataclasses import dataclass, field
from typing import Any

from swarmtune.errors import UsageError
from swarmtune.types import BlockSpan


class Dtype(enum.Enum):
    """Precision of the frozen blocks; ``auto`` is the one that the model is stored in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Quantize(enum.Enum):
    """What the linear layers of the frozen blocks hold their weights in; ``none`` is the dtype."""

    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"


class SwarmKind(enum.Enum):
    """Where the frozen blocks run."""

    LOCAL = "local"
    JOIN = "join"


class Codec(enum.Enum):
    """How tensors are compressed on the wire."""

    NONE = "none"


class Source(enum.Enum):
    """Where text comes from."""

    PYTHON_TOPICS = "python_topics"
    DATASET = "dataset"


class Schedule(enum.Enum):
    """Shape of the learning rate after its warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class ProgressKind(enum.Enum):
    """How progress is shown; ``auto`` is a bar on a terminal and lines elsewhere."""

    AUTO = "auto"
    BAR = "bar"
    LINES = "lines"
    NONE = "none"


def _need(ok: bool, sentence: str) -> None:
    """Refuse a value; ``sentence`` begins with the field's name, and the full key is put before it."""
    if not ok:
        raise ValueError(sentence)


def template_columns(template: str) -> list[str]:
    """The columns that ``"{question} {answer}"`` names.

    Raises:
        ValueError: none, or anything but plain names in the braces.
    """
    example = "such as '{question} {answer}'"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"text_template cannot be read: {error}; columns stand in braces, {example}") from error
    names = [name for _, name, _, _ in parts if name is not None]
    plain = all(re.fullmatch(r"[^\W\d][\w -]*", name) and not spec and not conversion for _, name, spec, conversion in parts if name is not None)
    _need(bool(names) and plain, f"text_template must hold names of columns in braces, {example}, and nothing but names; got {template!r}")
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class ModelConfig:
    """Which model."""

    path: str
    """A local directory in Hugging Face layout, a hub id, or ``pkg://package/folder`` for one inside a Python package."""

    def __post_init__(self) -> None:
        _need(bool(self.path), "path must not be empty")


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it is cut."""

    source: Source = Source.PYTHON_TOPICS
    """The help topics that come with Python, or anything that ``datasets`` reads."""
    path: str | None = None
    """For ``dataset``: a json, jsonl, parquet, csv, tsv, txt or arrow file, a pattern (``a/*.csv``), a directory, a saved dataset, a hub id."""
    name: str | None = None
    """Which configuration of a hub dataset, or of a directory with a dataset card."""
    revision: str | None = None
    """Which commit, branch or tag of a hub dataset."""
    text_column: str = "text"
    """The column that holds the text."""
    text_template: str | None = None
    """Text made of several columns instead, such as ``{question}\\n{answer}``; ``\\n`` is a line break."""
    split: str = "train"
    """The split that is trained on, of data that has several."""
    validation_fraction: float = 0.15
    """Share of the text held out for validation, by whole documents, unless one of the next two is given."""
    validation_split: str | None = None
    """Another split of the same data, for validation."""
    validation_path: str | None = None
    """Other data of any kind that ``path`` takes, for validation."""
    validation_windows: int | None = None
    """Windows of validation text at most; all if not given, and 256 of a stream."""
    streaming: bool = False
    """Read while training, holding only ``shuffle_windows``: for data too long to be prepared. Needs ``trainer.max_steps``."""
    shuffle_windows: int = 1024
    """Of a stream, how many windows are held to draw the next one from."""
    sequence_length: int = 128
    """Tokens per window."""
    batch_size: int = 8
    """Windows per batch."""
    num_workers: int = 0
    """Processes that prepare training batches; windows are ready in memory, so 0 is rarely slower. A stream takes 1 at most."""
    cache: bool = True
    """Keep the tokens of prepared data on disk for the next run."""
    cache_dir: str | None = None
    """Where; ``$XDG_CACHE_HOME/swarmtune`` or ``~/.cache/swarmtune`` if not given."""

    def __post_init__(self) -> None:
        _need(self.source is not Source.DATASET or bool(self.path), "path must name a file, a directory or a hub id")
        _need(0 < self.validation_fraction < 1, f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        _need(self.sequence_length >= 2, f"sequence_length must be at least 2, got {self.sequence_length}")
        _need(self.sequence_length <= 1 << 15, f"sequence_length must be at most {1 << 15}, got {self.sequence_length}")
        for name, low in (("batch_size", 1), ("num_workers", 0), ("shuffle_windows", 1), ("validation_windows", 1)):
            value = getattr(self, name)
            _need(value is None or value >= low, f"{name} must be at least {low}, got {value}")
        self._refuse_ignored()
        for name in ("split", "validation_split"):
            value = getattr(self, name)
            _need(value is None or re.fullmatch(r"\w+([.-]\w+)*", value) is not None, f"{name} must be the name of a split, got {value!r}")
        if self.text_template is not None:
            template_columns(self.text_template)

    def _refuse_ignored(self) -> None:
        """Refuse a key that would change nothing beside the others."""
        for name in ("path", "name", "revision", "text_column", "text_template", "split", "validation_split", "validation_path", "streaming"):
            changed = getattr(self, name) != getattr(type(self), name)
            _need(self.source is not Source.PYTHON_TOPICS or not changed, f"{name} needs data=PATH or ID: it says nothing about Python's help topics")
        apart = [name for name in ("validation_split", "validation_path") if getattr(self, name) is not None]
        _need(len(apart) < 2, "validation_split and data.validation_path exclude each other: validation text comes from one place")
        unused = apart and self.validation_fraction != type(self).validation_fraction
        _need(not unused, f"validation_fraction says nothing beside data.{''.join(apart)}: no text is cut off then")
        _need(self.validation_split != self.split, f"validation_split must be another split than data.split, got {self.split!r} for both")
        _need(self.text_template is None or self.text_column == "text", "text_column says nothing beside data.text_template")
        _need(self.streaming or self.shuffle_windows == type(self).shuffle_windows, "shuffle_windows needs data.streaming=true")
        _need(not self.streaming or self.num_workers <= 1, f"num_workers must be 0 or 1 for a stream, got {self.num_workers}")
        _need(self.cache or self.cache_dir is None, "cache_dir says nothing beside data.cache=false")
        _need(not self.streaming or self.cache_dir is None, "cache_dir says nothing beside data.streaming=true: a stream is not kept")


LOCAL_ONLY = ("servers", "dtype", "quantize", "threads")
"""Keys of ``swarm`` that only mean something where servers are started here."""


@dataclass(frozen=True)
class SwarmConfig:
    """Which servers run the frozen blocks, and how this client talks to them."""

    kind: SwarmKind = SwarmKind.LOCAL
    """``local`` starts bundled servers on this machine and stops them at the end; ``join`` uses a swarm that is already there."""
    initial_peers: tuple[str, ...] = ()
    """For ``join``: addresses (``/ip4/.../p2p/...``) of any servers of the swarm."""
    servers: int = 2
    """For ``local``: how many servers share the blocks evenly."""
    spans: tuple[str, ...] | None = None
    """For ``local``: the blocks of each server, such as ``["0:3", "3:6"]``, instead of an even split; a span given twice is a replica."""
    dtype: Dtype = Dtype.FLOAT32
    """For ``local``: precision of the frozen blocks."""
    quantize: Quantize = Quantize.NONE
    """For ``local``: ``int8`` or ``nf4`` hold the blocks in about a quarter or an eighth of float32; less exact, and not every adapter is allowed."""
    threads: int | None = None
    """For ``local``: threads of each server; if not given, the cores are shared out, because servers that compete for cores wait for each other."""
    micro_batch_tokens: int = 4096
    """Tokens per request; a larger batch is split, so that several requests are under way at once."""
    max_in_flight: int = 4
    """Requests under way at once."""
    patience_s: float = 30.0
    """Seconds of trying other servers before a call fails."""
    codec: Codec = Codec.NONE
    """How tensors are compressed on the wire; ``none`` is exact."""

    def __post_init__(self) -> None:
        joining = self.kind is SwarmKind.JOIN
        _need(not joining or bool(self.initial_peers), "initial_peers must list at least one server of the swarm to join")
        _need(joining or not self.initial_peers, "initial_peers needs swarm=join")
        _need(not joining or self.spans is None, "spans needs swarm=local: servers of another swarm choose their own blocks")
        for name in LOCAL_ONLY:
            unused = joining and getattr(self, name) != getattr(type(self), name)
            _need(not unused, f"{name} needs swarm=local: the servers of another swarm are not started here")
        unused = self.spans is not None and self.servers != type(self).servers
        _need(not unused, f"servers={self.servers} and swarm.spans exclude each other: each span is one server")
        _need(self.servers >= 1, f"servers must be at least 1, got {self.servers}")
        _need(self.threads is None or self.threads >= 1, f"threads must be at least 1, got {self.threads}")
        _need(self.spans is None or len(self.spans) > 0, 'spans must list at least one span, such as ["0:3", "3:6"]')
        for span in self.spans or ():
            try:
                BlockSpan.parse(span)
            except UsageError as error:
                raise ValueError(f"spans: {error}") from error
        _need(self.micro_batch_tokens >= 1, f"micro_batch_tokens must be at least 1, got {self.micro_batch_tokens}")
        _need(self.max_in_flight >= 1, f"max_in_flight must be at least 1, got {self.max_in_flight}")
        _need(self.patience_s > 0, f"patience_s must be above 0, got {self.patience_s}")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on what learns, and its learning rate over time."""

    lr: float = 1e-3
    """Highest learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients."""
    schedule: Schedule = Schedule.COSINE
    """Shape of the learning rate after its warm-up."""
    warmup_steps: int = 10
    """Optimizer steps over which the learning rate rises from 0."""

    def __post_init__(self) -> None:
        _need(0 < self.lr < math.inf, f"lr must be a finite number above 0, got {self.lr}")
        _need(self.weight_decay >= 0, f"weight_decay must be at least 0, got {self.weight_decay}")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            _need(0 <= beta < 1, f"{name} must be at least 0 and below 1, got {beta}")
        _need(self.warmup_steps >= 0, f"warmup_steps must be at least 0, got {self.warmup_steps}")


@dataclass(frozen=True)
class LoggerConfig:
    """Where metrics go besides the CSV file, which is always written."""

    wandb: bool = False
    """Also log to Weights & Biases: online where there is a login, otherwise offline, which ``wandb sync`` uploads later."""
    project: str = "swarmtune"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; the login's own if not given."""
    name: str | None = None
    """W&B name of the run; ``<recipe>-<model>-<run directory>`` if not given."""
    group: str | None = None
    """W&B group; the recipe, or the directory of a sweep, if not given."""
    tags: tuple[str, ...] = ()
    """W&B tags besides recipe, model and kind of adapter."""
    tensorboard: bool = False
    """Also log to TensorBoard, which ``pip install swarmtune[tensorboard]`` brings."""

    def __post_init__(self) -> None:
        _need(bool(self.project.strip()), "project must not be empty")
        for key in ("project", "entity", "name", "group", "tags"):
            _need(self.wandb or getattr(self, key) == getattr(type(self), key), f"{key} needs logger=wandb")
        for tag in self.tags:
            _need(1 <= len(tag) <= 64, f"tags must have 1 to 64 characters each, got {tag!r}")


@dataclass(frozen=True)
class CallbacksConfig:
    """What happens around training."""

    checkpoint_every_steps: int = 100
    """Optimizer steps between checkpoints, each with a PEFT directory beside it."""
    checkpoints_kept: int = 2
    """How many of the newest checkpoints stay; -1 keeps all."""
    progress: ProgressKind = ProgressKind.AUTO
    """How progress is shown."""
    line_every_s: float = 5.0
    """Seconds between lines of progress."""
    loss_curve: bool = True
    """Draw the loss curve at the end."""

    def __post_init__(self) -> None:
        _need(self.checkpoint_every_steps >= 1, f"checkpoint_every_steps must be at least 1, got {self.checkpoint_every_steps}")
        _need(self.checkpoints_kept == -1 or self.checkpoints_kept >= 1, f"checkpoints_kept must be -1 or at least 1, got {self.checkpoints_kept}")
        _need(self.line_every_s > 0, f"line_every_s must be above 0, got {self.line_every_s}")


@dataclass(frozen=True)
class Config:
    """One training run."""

    recipe: str
    """The Python file that builds the module and the data: a name in ``recipes/``, or an absolute path."""
    model: ModelConfig
    """Group ``model``, or ``model=<local directory or hub id>``."""
    adapter: dict[str, Any]
    """Group ``adapter``: ``peft_type`` and any field of PEFT's config of that type; or ``adapter=<saved adapter directory>``, which is ``path``."""
    data: DataConfig = field(default_factory=DataConfig)
    """Group ``data``, or ``data=<local file, directory or hub id>``."""
    swarm: SwarmConfig = field(default_factory=SwarmConfig)
    """Group ``swarm``."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its schedule."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Group ``trainer``: any flag of ``lightning.Trainer``."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Group ``logger``."""
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    """Group ``callbacks``."""
    seed: int = 0
    """Seed of initial values, data order and dropout."""
    run_dir: str | None = None
    """Where everything of this run is written; ``runs/<name>/<time>`` if not given."""
    name: str = ""
    """What runs are filed under; the name of the recipe's YAML file if not given."""

    def __post_init__(self) -> None:
        _need(0 <= self.seed < 2**32, f"seed must be at least 0 and below 2**32, got {self.seed}")
        _need("/" not in self.name and self.name not in (".", ".."), f"name must be the name of a directory, got {self.name!r}")
        ends = self.trainer.get("fast_dev_run") or self.trainer.get("max_steps") not in (None, -1)
        _need(not self.data.streaming or bool(ends), "data.streaming needs trainer.max_steps: a stream has no end")

    @property
    def title(self) -> str:
        """``name``, or the recipe's where a config was made without one."""
        return self.name or self.recipe.rpartition("/")[2].removesuffix(".py")
