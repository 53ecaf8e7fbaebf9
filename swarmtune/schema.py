"""The schema of a training run: what each key means, and which values it takes. ``config.py`` fills it from YAML files and words."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Any

from swarmtune.data_schema import DataConfig, need
from swarmtune.errors import UsageError
from swarmtune.types import MAX_LANES, BlockSpan, Copies, Pipeline


class Dtype(enum.Enum):
    """Precision of the frozen blocks; ``auto`` is the one that the model is stored in, where the servers' hardware computes in it."""

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
    """How hidden states and gradients are compressed on the wire."""

    NONE = "none"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"


class Compile(enum.Enum):
    """Whether blocks may run as compiled code: faster, and other last digits than eager code."""

    NONE = "none"
    AUTO = "auto"


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


@dataclass(frozen=True)
class ModelConfig:
    """Which model."""

    path: str
    """A local directory in Hugging Face layout, a hub id, or ``pkg://package/folder`` for one inside a Python package."""

    def __post_init__(self) -> None:
        need(bool(self.path), "path must not be empty")


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
    """Micro-batches under way at once."""
    in_flight_gib: float = 1.0
    """GiB of hidden states under way at once, there and back; one micro-batch is under way in any case."""
    lanes: int = 1
    """Micro-batches go in turns over so many routes, where there are replicas; gradients are added by lane, so the last digits depend on it."""
    compile: Compile = Compile.NONE
    """``auto`` lets servers run compiled blocks once they have compiled them, in the background; then last digits depend on when that is."""
    pipeline: Pipeline = Pipeline.ONE_F_ONE_B
    """For training with several micro-batches: ``1f1b`` starts each backward as soon as its micro-batch is through, ``gpipe`` after all forwards."""
    patience_s: float = 30.0
    """Seconds of trying other servers before a call fails."""
    call_timeout_s: float = 300.0
    """Seconds that one call to a live server may take; where another server can do the work, a call that is slow for its kind is left much sooner."""
    chaining: bool = True
    """Servers hand hidden states and gradients on to each other where they can; ``false`` moves all through this machine. Same bits."""
    copies: Copies = Copies.AUTO
    """Whether what servers hand on comes here, too: ``all``, ``none``, or ``auto`` where servers lose graphs. Costs traffic, saves computing."""
    history: bool = False
    """Write every call, asked and answered, to ``history.jsonl`` in the run directory; ``scripts/chaos judge`` reads it."""
    codec: Codec = Codec.NONE
    """How hidden states travel: ``none`` is exact, ``bf16`` and ``fp16`` take half of float32's bytes, ``int8`` a quarter (docs/codecs.md)."""
    grad_codec: Codec | None = None
    """The same for their gradients; as ``codec`` if not given."""

    def __post_init__(self) -> None:
        joining = self.kind is SwarmKind.JOIN
        need(not joining or bool(self.initial_peers), "initial_peers must list at least one server of the swarm to join")
        need(joining or not self.initial_peers, "initial_peers needs swarm=join")
        need(not joining or self.spans is None, "spans needs swarm=local: servers of another swarm choose their own blocks")
        for name in LOCAL_ONLY:
            unused = joining and getattr(self, name) != getattr(type(self), name)
            need(not unused, f"{name} needs swarm=local: the servers of another swarm are not started here")
        unused = self.spans is not None and self.servers != type(self).servers
        need(not unused, f"servers={self.servers} and swarm.spans exclude each other: each span is one server")
        need(self.servers >= 1, f"servers must be at least 1, got {self.servers}")
        need(self.threads is None or self.threads >= 1, f"threads must be at least 1, got {self.threads}")
        need(self.spans is None or len(self.spans) > 0, 'spans must list at least one span, such as ["0:3", "3:6"]')
        for span in self.spans or ():
            try:
                BlockSpan.parse(span)
            except UsageError as error:
                raise ValueError(f"spans: {error}") from error
        need(self.micro_batch_tokens >= 1, f"micro_batch_tokens must be at least 1, got {self.micro_batch_tokens}")
        need(self.max_in_flight >= 1, f"max_in_flight must be at least 1, got {self.max_in_flight}")
        need(1 <= self.lanes <= MAX_LANES, f"lanes must be from 1 to {MAX_LANES}, got {self.lanes}")
        need(0 < self.in_flight_gib < 1e6, f"in_flight_gib must be above 0 and below a million, got {self.in_flight_gib}")
        need(0 < self.call_timeout_s < 1e6, f"call_timeout_s must be above 0 and below a million, got {self.call_timeout_s}")
        need(0 < self.patience_s < 1e6, f"patience_s must be above 0 and below a million, got {self.patience_s}")


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
        need(0 < self.lr < math.inf, f"lr must be a finite number above 0, got {self.lr}")
        need(self.weight_decay >= 0, f"weight_decay must be at least 0, got {self.weight_decay}")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            need(0 <= beta < 1, f"{name} must be at least 0 and below 1, got {beta}")
        need(self.warmup_steps >= 0, f"warmup_steps must be at least 0, got {self.warmup_steps}")


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
        need(bool(self.project.strip()), "project must not be empty")
        for key in ("project", "entity", "name", "group", "tags"):
            need(self.wandb or getattr(self, key) == getattr(type(self), key), f"{key} needs logger=wandb")
        for tag in self.tags:
            need(1 <= len(tag) <= 64, f"tags must have 1 to 64 characters each, got {tag!r}")


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
        need(self.checkpoint_every_steps >= 1, f"checkpoint_every_steps must be at least 1, got {self.checkpoint_every_steps}")
        need(self.checkpoints_kept == -1 or self.checkpoints_kept >= 1, f"checkpoints_kept must be -1 or at least 1, got {self.checkpoints_kept}")
        need(self.line_every_s > 0, f"line_every_s must be above 0, got {self.line_every_s}")


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
        need(0 <= self.seed < 2**32, f"seed must be at least 0 and below 2**32, got {self.seed}")
        need("/" not in self.name and self.name not in (".", ".."), f"name must be the name of a directory, got {self.name!r}")
        ends = self.trainer.get("fast_dev_run") or self.trainer.get("max_steps") not in (None, -1)
        need(not self.data.streaming or bool(ends), "data.streaming needs trainer.max_steps: a stream has no end")

    @property
    def title(self) -> str:
        """``name``, or the recipe's where a config was made without one."""
        return self.name or self.recipe.rpartition("/")[2].removesuffix(".py")
