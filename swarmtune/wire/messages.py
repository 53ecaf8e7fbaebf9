"""The messages of the one verb, ``call``: what may stand in each, checked at birth."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, cast

from torch import Tensor

from swarmtune.errors import UsageError, WireError
from swarmtune.types import AXES, Axis, BlockSpan
from swarmtune.wire.codec import Message
from swarmtune.wire.frames import WireLimits, dump_json
from swarmtune.wire.tensors import ALIGNMENT

MAX_DETAIL = 2000
MAX_RETRY_MS = 60_000


class CallKind(StrEnum):
    """What a call asks for."""

    INFO = "info"
    FORWARD = "forward"
    BACKWARD = "backward"
    KEPT_BACKWARD = "kept_backward"
    DELIVER = "deliver"
    INITIAL = "initial"


class FaultCode(StrEnum):
    """Why a server did not do what a call asked."""

    BAD_REQUEST = "bad_request"
    UNSUPPORTED = "unsupported"
    NON_FINITE = "non_finite"
    NOT_HERE = "not_here"
    BUSY = "busy"
    DRAINING = "draining"
    EXPIRED = "expired"
    NO_GRAPH = "no_graph"
    NO_TENSORS = "no_tensors"
    INTERNAL = "internal"


DETERMINISTIC = frozenset({FaultCode.BAD_REQUEST, FaultCode.UNSUPPORTED, FaultCode.NON_FINITE})
"""Faults that another honest server would answer as well: they are raised, not retried."""


def text(value: object, what: str, limit: int = 256) -> str:
    """A peer's short printable string."""
    if not isinstance(value, str) or len(value) > limit or not value.isprintable():
        raise WireError(f"{what} must be a string of at most {limit} printable characters")
    return value


def integer(value: object, what: str, low: int = 0, high: int = 1 << 40) -> int:
    """A peer's bounded whole number."""
    if type(value) is not int or not low <= value <= high:
        raise WireError(f"{what} must be an integer from {low} to {high}")
    return value


def block_span(value: object, what: str) -> BlockSpan:
    """A peer's ``[start, stop]``."""
    if not isinstance(value, list) or len(value) != 2:
        raise WireError(f"{what} must be [start, stop]")
    start, stop = (integer(item, what, 0, 1 << 20) for item in value)
    try:
        return BlockSpan(start, stop)
    except UsageError as error:
        raise WireError(f"{what}: {error}") from error


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """The configuration of a PEFT tuner as plain JSON, and its digest."""

    config: Mapping[str, Any]
    digest: str

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> AdapterSpec:
        """Attach the digest: the first 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return cls(config, hashlib.sha256(dump_json(config)).hexdigest()[:16])

    @classmethod
    def from_json(cls, value: object) -> AdapterSpec:
        """Check what a peer sent; the digest is computed here, never believed."""
        if not isinstance(value, dict):
            raise WireError("an adapter configuration must be an object")
        try:
            return cls.of(value)
        except (ValueError, RecursionError) as error:
            raise WireError("an adapter configuration is nested too deeply") from error


@dataclass(frozen=True, slots=True, eq=False)
class CallKwarg:
    """A kwarg as one call carries it: its blocks are the part of the called span that it is for.

    Attributes:
        digest: of the tensor's content, for a server that keeps it for later calls; ``""`` where it need not.
        carried: whether the call holds the tensor; if not, the server has it under ``digest``.
    """

    name: str
    tensor: Tensor
    axes: Mapping[Axis, int]
    blocks: BlockSpan
    requires_grad: bool
    digest: str = ""
    carried: bool = True

    def to_json(self) -> list[object]:
        """``[name, axes, [start, stop], requires_grad]``, and the digest where there is one."""
        plain: list[object] = [self.name, dict(self.axes), [self.blocks.start, self.blocks.stop], self.requires_grad]
        return [*plain, self.digest] if self.digest else plain

    @classmethod
    def from_json(cls, item: object, tensor: Tensor, carried: bool = True) -> CallKwarg:
        """Check one entry of a peer's header against its tensor."""
        digest = kwarg_digest(item)
        name, axes, blocks, requires_grad = cast(list[object], item)[:4]
        name = text(name, "a kwarg's name", 512)
        if not isinstance(axes, dict) or not set(axes) <= set(AXES):
            raise WireError(f"kwarg {name!r}: axes may be batch and sequence")
        checked = {cast(Axis, axis): integer(dimension, f"kwarg {name!r}: {axis} axis", 0, tensor.dim() - 1) for axis, dimension in axes.items()}
        if len(set(checked.values())) != len(checked):
            raise WireError(f"kwarg {name!r}: batch and sequence cannot be the same axis")
        if not isinstance(requires_grad, bool) or (requires_grad and not tensor.is_floating_point()):
            raise WireError(f"kwarg {name!r}: only a floating-point tensor can ask for a gradient")
        return cls(name, tensor, checked, block_span(blocks, f"kwarg {name!r}: blocks"), requires_grad, digest, carried)


def kwarg_digest(item: object) -> str:
    """The digest in an entry of a peer's header; ``""`` where there is none."""
    if not isinstance(item, list) or len(item) not in (4, 5):
        raise WireError("a kwarg entry must be [name, axes, [start, stop], requires_grad] or have a digest as well")
    if len(item) == 4:
        return ""
    digest = item[4]
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise WireError("a kwarg's digest must be 32 hexadecimal digits")
    return digest


def references(message: Message) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors that a forward or a backward brings under a digest, and the digests of those that the server has been given before."""
    entries = message.fields.get("kwargs")
    if not isinstance(entries, list):
        return {}, []
    digests = {index: digest for index, entry in enumerate(entries) if (digest := kwarg_digest(entry))}
    brought = {digest: message.tensors[f"k{index}"] for index, digest in digests.items() if f"k{index}" in message.tensors}
    return brought, [digest for digest in dict.fromkeys(digests.values()) if digest not in brought]


class TensorsMissing(WireError):
    """A call leaves out tensors that are not kept here."""


_CALL_FIELDS = frozenset({"span", "model", "kwargs", "remaining_ms", "adapter", "input_grad", "dropout", "keep", "release", "sum", "compile"})
SUMS_GRADIENTS = "sums_gradients"
"""Feature of a server: it takes ``sum`` in a backward, and holds gradients of micro-batches until all of a pass can be added."""
MAX_SUMMED = 4096
MAX_ROUND_TRIPS = 64
"""To other servers, in what a server says of itself."""
MAX_ROUND_TRIP_US = 60_000_000
COMPILES = "compiles"
"""Feature of a server: it compiles programs for calls that allow it."""
KEEPS_GRAPHS = "keeps_graphs"
"""Feature of a server: it takes ``keep`` and ``release`` in a forward, and the call kind ``kept_backward``."""
MAX_RELEASED = 1024
MAX_HANDLE = (1 << 53) - 1
STORES_TENSORS = "stores_tensors"
"""Feature of a server: a call may name a kwarg's content by a digest, and leave the tensor out of later calls."""
_DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class DropoutSeed:
    """What makes the masks of one call: the same on every server, whenever it is computed again.

    Attributes:
        seed: of the body call, from 0 to 2**63 - 1.
        first_row: number of the micro-batch's first row in the batch, from 0 to 2**32 - 1.
    """

    seed: int
    first_row: int = 0

    def to_json(self) -> list[int]:
        """``[seed, first_row]``."""
        return [self.seed, self.first_row]

    @classmethod
    def from_json(cls, item: object) -> DropoutSeed:
        """Check a peer's."""
        if not isinstance(item, list) or len(item) != 2:
            raise WireError("dropout must be [seed, first_row]")
        return cls(integer(item[0], "a dropout seed", 0, (1 << 63) - 1), integer(item[1], "a first row", 0, (1 << 32) - 1))


@dataclass(frozen=True, slots=True)
class GradientSum:
    """A backward whose gradients by kwargs without axes are wanted as a sum over the micro-batches of a pass.

    Attributes:
        ticket: number of the pass, chosen by the client, from 0 to 2**53 - 1.
        index: of this micro-batch.
        count: of all micro-batches.
    """

    ticket: int
    index: int
    count: int

    def to_json(self) -> list[int]:
        """``[ticket, index, count]``."""
        return [self.ticket, self.index, self.count]

    @classmethod
    def from_json(cls, item: object) -> GradientSum | None:
        """Check a peer's; ``None`` where there is none."""
        if item is None:
            return None
        if not isinstance(item, list) or len(item) != 3:
            raise WireError("sum must be [ticket, index, count]")
        count = integer(item[2], "a number of micro-batches", 1, MAX_SUMMED)
        return cls(integer(item[0], "a ticket", 0, MAX_HANDLE), integer(item[1], "a micro-batch", 0, count - 1), count)


def answer_bytes(hidden: Tensor, kwargs: Iterable[CallKwarg], backward: bool) -> int:
    """Largest body of an answer: the hidden states, and after a backward one gradient per block of each kwarg; padding included."""
    parts = [hidden.nbytes]
    if backward:
        parts += [len(kwarg.blocks) * kwarg.tensor.nbytes for kwarg in kwargs if kwarg.requires_grad]
    return sum(-(-part // ALIGNMENT) * ALIGNMENT for part in parts)


def _kwargs(entries: object, tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> tuple[CallKwarg, ...]:
    """Put the kwargs and their tensors together, those that the call holds and those that were given before."""
    if not isinstance(entries, list) or len(entries) > WireLimits().tensors:
        raise WireError(f"kwargs must be a list of at most {WireLimits().tensors}")
    found = []
    digests = [kwarg_digest(entry) for entry in entries]
    stored = {**stored, **{digest: tensors[f"k{index}"] for index, digest in enumerate(digests) if digest and f"k{index}" in tensors}}
    for index, entry in enumerate(entries):
        carried, digest = tensors.get(f"k{index}"), digests[index]
        tensor = stored.get(digest) if carried is None else carried
        if tensor is None and digest:
            raise TensorsMissing(f"no tensor is kept here under {digest}: send it")
        if tensor is None:
            raise WireError("the kwargs and their tensors do not match")
        found.append(CallKwarg.from_json(entry, tensor, carried is not None))
    if set(tensors) != {f"k{index}" for index, kwarg in enumerate(found) if kwarg.carried}:
        raise WireError("the kwargs and their tensors do not match")
    return tuple(found)


def fits_an_answer(call: SpanCall) -> bool:
    """Whether the answer to the backward of this forward is not too large, its gradient in float32."""
    hidden = answer_bytes(call.hidden_BTH, call.kwargs, True) + call.hidden_BTH.nbytes
    return hidden <= WireLimits().message_bytes


def _check_answer_size(hidden: Tensor, kwargs: tuple[CallKwarg, ...], backward: bool) -> None:
    """A gradient per block can make an answer many times as large as its call: refuse before computing what could not be sent."""
    size, limit = answer_bytes(hidden, kwargs, backward), WireLimits().message_bytes
    if size > limit:
        raise WireError(
            f"the answer to this call would have {size} bytes, over the limit of {limit}: use a smaller micro_batch_tokens or shorter spans"
        )


@dataclass(frozen=True, slots=True, eq=False)
class SpanCall:
    """Run ``span`` forward, or backward where ``grad_BTH`` is given.

    Attributes:
        model: digest of the model's configuration; a server of another model refuses.
        hidden_BTH: input of the first block of ``span``.
        grad_BTH: gradient of the loss by the output of the last block; ``None`` for a forward.
        input_grad: whether a backward returns the gradient by ``hidden_BTH``; in a forward, whether one will ask for it.
        remaining_ms: how long the caller will still wait.
        dropout: the adapter trains with dropout, by this seed.
        keep: a forward may leave its graph behind under a handle, because a backward will follow.
        release: handles that the caller does not need any more.
        sum: of a backward, where the gradients of all micro-batches are added on the server.
        compile: compiled code may do it, whose last digits differ from those of eager code.
    """

    span: BlockSpan
    model: str
    hidden_BTH: Tensor
    kwargs: tuple[CallKwarg, ...] = ()
    adapter: AdapterSpec | None = None
    grad_BTH: Tensor | None = None
    input_grad: bool = False
    remaining_ms: int = 300_000
    dropout: DropoutSeed | None = None
    keep: bool = False
    release: tuple[int, ...] = ()
    sum: GradientSum | None = None
    compile: bool = False

    @property
    def answer_bytes(self) -> int:
        """Largest body of an honest answer."""
        return answer_bytes(self.hidden_BTH if self.grad_BTH is None else self.grad_BTH, self.kwargs, self.grad_BTH is not None)

    def to_message(self) -> Message:
        """As it travels: tensors ``hidden``, ``grad`` and ``k0``, ``k1``... in the order of the kwargs."""
        fields: dict[str, Any] = {
            "span": [self.span.start, self.span.stop],
            "model": self.model,
            "kwargs": [kwarg.to_json() for kwarg in self.kwargs],
            "remaining_ms": self.remaining_ms,
        }
        if self.adapter is not None:
            fields["adapter"] = dict(self.adapter.config)
        if self.dropout is not None:
            fields["dropout"] = self.dropout.to_json()
        tensors = {"hidden": self.hidden_BTH}
        kind = CallKind.FORWARD
        if self.grad_BTH is not None:
            kind, tensors["grad"] = CallKind.BACKWARD, self.grad_BTH
        if self.grad_BTH is not None or self.input_grad:
            fields["input_grad"] = self.input_grad
        if self.keep:
            fields["keep"] = True
        if self.release:
            fields["release"] = list(self.release)
        if self.compile:
            fields["compile"] = True
        if self.sum is not None:
            fields["sum"] = self.sum.to_json()
        tensors.update((f"k{index}", kwarg.tensor) for index, kwarg in enumerate(self.kwargs) if kwarg.carried)
        return Message(kind, fields, tensors)

    @classmethod
    def from_message(cls, message: Message, stored: Mapping[str, Tensor] | None = None) -> SpanCall:
        """Check a peer's message.

        Args:
            message: what came.
            stored: by digest, tensors that the call may leave out.

        Raises:
            TensorsMissing: it leaves out others.
            WireError: anything else missing, superfluous, of the wrong type or shape.
        """
        fields, tensors = message.fields, dict(message.tensors)
        if unknown := set(fields) - _CALL_FIELDS:  # to ignore what a newer client asks for would be silently wrong
            raise WireError(f"a call holds a field that this server does not know, update the older of the two sides: {sorted(unknown)[0]!r:.80}")
        hidden = tensors.pop("hidden", None)
        if hidden is None or hidden.dim() != 3 or not hidden.is_floating_point() or 0 in hidden.shape:
            raise WireError("a call needs a floating-point tensor 'hidden' of shape (batch, sequence, hidden)")
        grad = tensors.pop("grad", None)
        if (message.kind == CallKind.BACKWARD) != (grad is not None):
            raise WireError("a backward needs a tensor 'grad', and nothing else does")
        if grad is not None and (grad.shape != hidden.shape or not grad.is_floating_point()):
            raise WireError("'grad' must have the shape of 'hidden'")
        kwargs = _kwargs(fields.get("kwargs"), tensors, stored or {})
        for kwarg in kwargs:
            for axis, length in zip(AXES, hidden.shape[:2], strict=True):
                if axis in kwarg.axes and kwarg.tensor.shape[kwarg.axes[axis]] != length:
                    raise WireError(f"kwarg {kwarg.name!r}: its {axis} axis does not have the length of the hidden states'")
        input_grad, keep, compiled = (fields.get(name, False) for name in ("input_grad", "keep", "compile"))
        if not all(isinstance(flag, bool) for flag in (input_grad, keep, compiled)):
            raise WireError("input_grad, keep and compile must be true or false")
        released = fields.get("release", [])
        if not isinstance(released, list) or len(released) > MAX_RELEASED:
            raise WireError(f"release must be a list of at most {MAX_RELEASED} handles")
        if (keep or released) and grad is not None:
            raise WireError("only a forward leaves a graph behind or releases others")
        wanted = GradientSum.from_json(fields.get("sum"))
        if wanted is not None and grad is None:
            raise WireError("only gradients are added")
        adapter, dropout = fields.get("adapter"), fields.get("dropout")
        _check_answer_size(hidden if grad is None else grad, kwargs, grad is not None)
        return cls(
            span=block_span(fields.get("span"), "span"),
            model=text(fields.get("model"), "model"),
            hidden_BTH=hidden,
            kwargs=kwargs,
            adapter=None if adapter is None else AdapterSpec.from_json(adapter),
            grad_BTH=grad,
            input_grad=input_grad,
            remaining_ms=integer(fields.get("remaining_ms"), "remaining_ms", 1, 1 << 32),
            dropout=None if dropout is None else DropoutSeed.from_json(dropout),
            keep=keep,
            release=tuple(integer(handle, "a handle", 1, MAX_HANDLE) for handle in released),
            sum=wanted,
            compile=compiled,
        )


@dataclass(frozen=True, slots=True)
class ServerTimes:
    """Where a call spent its time on the server, as the server says.

    Attributes:
        queue_us: microseconds from its arrival to the start of the work.
        compute_us: microseconds of the work.
        block_forwards: how many blocks it ran forward for it, a backward's recomputing included.
    """

    queue_us: int
    compute_us: int
    block_forwards: int = 0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ServerTimes | None:
        """Read them from the fields of a result; a server may leave them out."""
        if "queue_us" not in fields and "compute_us" not in fields:
            return None
        return cls(*(integer(fields.get(name, default), name) for name, default in (("queue_us", None), ("compute_us", None), ("block_forwards", 0))))


@dataclass(frozen=True, slots=True, eq=False)
class SpanResult:
    """The output of a forward, or the gradients of a backward.

    Attributes:
        hidden_BTH: output of the span (forward) or gradient by its input (backward; ``None`` where not asked for).
        kwarg_grads: by index of the call's kwarg: shape ``(blocks of that kwarg, *its shape)``, one gradient per block in ascending
            order, so that the client's sum over blocks does not depend on where a route is cut.
        times: how long the server says that it took, where it says so.
        handle: under which a forward's graph is kept; 0 where none is.
        withheld: gradients by kwargs without axes are held for the sum.
        summed: the micro-batches over which those that are here have been added; empty where they are this one's.
        sent: the hidden states or their gradient have gone to the next server.
        compiled: compiled code has done it.
    """

    hidden_BTH: Tensor | None
    kwarg_grads: Mapping[int, Tensor] = field(default_factory=dict)
    times: ServerTimes | None = None
    handle: int = 0
    withheld: bool = False
    summed: tuple[int, ...] = ()
    sent: bool = False
    compiled: bool = False

    def to_message(self) -> Message:
        """As it travels."""
        tensors = {} if self.hidden_BTH is None else {"hidden": self.hidden_BTH}
        tensors.update((f"k{index}", grad) for index, grad in self.kwarg_grads.items())
        fields: dict[str, Any] = {} if self.times is None else asdict(self.times)
        more = {"handle": self.handle, "withheld": self.withheld, "summed": list(self.summed), "sent": self.sent, "compiled": self.compiled}
        return Message("result", {**fields, **{name: value for name, value in more.items() if value}}, tensors)

    @classmethod
    def from_message(cls, message: Message, call: SpanCall, passes_on: bool = False, copy: bool = False) -> SpanResult:
        """Check a reply against the call that it answers: exactly the tensors asked for, in their shapes and types.

        Args:
            message: the reply.
            call: what it answers.
            passes_on: the server was to send the hidden states on, and may say that it did.
            copy: and to answer with them all the same.

        Raises:
            WireError: anything else.
        """
        if message.kind != "result":
            raise WireError(f"expected a result, got {message.kind!r:.80}")
        tensors = dict(message.tensors)
        hidden = tensors.pop("hidden", None)
        sent = passes_on and message.fields.get("sent") is True
        if (hidden is not None) != ((call.grad_BTH is None or call.input_grad) and (copy or not sent)):
            raise WireError("a reply holds a hidden state where none was asked for, or lacks it")
        like = call.hidden_BTH if call.grad_BTH is None else call.grad_BTH
        if hidden is not None and (hidden.shape != like.shape or hidden.dtype != like.dtype):
            raise WireError(f"a reply's hidden state is {hidden.dtype} {tuple(hidden.shape)}, expected {like.dtype} {tuple(like.shape)}")
        withheld, summed = _sums(message.fields, call)
        grads: dict[int, Tensor] = {}
        for index, kwarg in enumerate(call.kwargs if call.grad_BTH is not None else ()):
            if not kwarg.requires_grad or (withheld and not kwarg.axes):
                continue
            grad = tensors.pop(f"k{index}", None)
            if grad is None or grad.shape != (len(kwarg.blocks), *kwarg.tensor.shape) or grad.dtype != kwarg.tensor.dtype:
                raise WireError(f"a reply lacks the gradient of {kwarg.name}, or it has the wrong shape or type")
            grads[index] = grad
        if tensors:
            raise WireError(f"a reply holds tensors that nobody asked for: {', '.join(sorted(tensors))[:200]}")
        compiled = message.fields.get("compiled") is True
        handle = integer(message.fields.get("handle", 0), "a handle", 0, MAX_HANDLE)
        return cls(hidden, grads, ServerTimes.from_json(message.fields), handle if call.keep else 0, withheld, summed, sent, compiled)


def _sums(fields: Mapping[str, Any], call: SpanCall) -> tuple[bool, tuple[int, ...]]:
    """Whether a peer's result holds gradients back, and over which micro-batches it has added them: all of the pass, or it is not believed."""
    withheld, summed = fields.get("withheld", False), fields.get("summed", [])
    if not isinstance(withheld, bool) or not isinstance(summed, list):
        raise WireError("withheld must be true or false, and summed a list")
    if not withheld and not summed:
        return False, ()
    if call.sum is None or (withheld and summed) or (summed and summed != list(range(call.sum.count))):
        raise WireError("a reply adds gradients of other micro-batches than those of the pass, or withholds what nobody wanted to be added")
    return withheld, tuple(summed)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a call was not done.

    Attributes:
        block: the first bad block, where one is known.
        retry_ms: with busy, when to ask again, as the server guesses; older servers do not say.
    """

    code: FaultCode
    detail: str
    block: int | None = None
    retry_ms: int | None = None

    def to_message(self) -> Message:
        """As it travels; the detail is cut at 2000 characters."""
        fields: dict[str, Any] = {"code": str(self.code), "detail": self.detail[:MAX_DETAIL], "block": self.block}
        if self.retry_ms is not None:
            fields["retry_ms"] = self.retry_ms
        return Message("fault", fields)

    @classmethod
    def from_message(cls, message: Message) -> Fault:
        """Check a peer's fault; an unknown code counts as internal, and unprintable characters are replaced."""
        code = text(message.fields.get("code"), "code")
        detail, block = message.fields.get("detail"), message.fields.get("block")
        if not isinstance(detail, str) or len(detail) > MAX_DETAIL:
            raise WireError(f"detail must be a string of at most {MAX_DETAIL} characters")
        printable = "".join(character if character.isprintable() else " " for character in detail)
        known = FaultCode(code) if code in FaultCode._value2member_map_ else FaultCode.INTERNAL
        retry_ms = message.fields.get("retry_ms")
        return cls(
            known,
            printable,
            None if block is None else integer(block, "block", 0, 1 << 20),
            None if retry_ms is None else integer(retry_ms, "retry_ms", 1, MAX_RETRY_MS),
        )


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says of itself.

    Attributes:
        model: digest of the model's configuration.
        num_blocks: blocks of the whole model.
        span: the blocks that it holds.
        block_digests: one digest of the stored weights per held block.
        dtype: the element type it computes in, such as ``float32``.
        numeric_class: servers of one class give the same bits for the same call.
        numeric: what the class is made of, for people.
        version: of the swarmtune that runs there.
        name: what its owner calls it.
        rate_tok_s: tokens times blocks that it computed per second lately; 0 where unknown.
        family: whose server it is; the same on all servers of one owner.
        draining: it finishes what is in flight and takes no new work.
        features: what it takes in calls that older servers refuse.
        round_trips: microseconds from it to other servers, by peer id, as it measured them.
    """

    model: str
    num_blocks: int
    span: BlockSpan
    block_digests: tuple[str, ...]
    dtype: str
    numeric_class: str
    numeric: Mapping[str, str]
    version: str
    name: str = ""
    rate_tok_s: int = 0
    family: str = ""
    draining: bool = False
    features: tuple[str, ...] = ()
    round_trips: Mapping[str, int] = field(default_factory=dict)

    @property
    def quantisation(self) -> str:
        """How it holds the weights: ``none``, or a mode such as ``int8``."""
        return self.numeric.get("quantisation", "none")

    @property
    def mode(self) -> str:
        """What decides more than the last digits of a result: the dtype, and what the weights are held in."""
        return self.dtype if self.quantisation == "none" else f"{self.dtype} over {self.quantisation} weights"

    def to_json(self) -> dict[str, Any]:
        """Plain fields."""
        fields = asdict(self)
        fields["span"], fields["block_digests"] = [self.span.start, self.span.stop], list(self.block_digests)
        fields["features"] = list(self.features)
        if not self.round_trips:
            del fields["round_trips"]
        return fields

    def to_message(self) -> Message:
        """As it travels."""
        return Message("info", self.to_json())

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ServerInfo:
        """Check a peer's description of itself.

        Raises:
            WireError: a field is missing, of the wrong type, or does not fit the others.
        """
        span = block_span(fields.get("span"), "span")
        num_blocks = integer(fields.get("num_blocks"), "num_blocks", 1, 1 << 20)
        draining = fields.get("draining", False)
        if not isinstance(draining, bool):
            raise WireError("draining must be true or false")
        digests, numeric, features = fields.get("block_digests"), fields.get("numeric"), fields.get("features", [])
        if not isinstance(features, list) or len(features) > 64:
            raise WireError("a server's features must be a short list")
        if not isinstance(digests, list) or len(digests) != len(span) or span.stop > num_blocks:
            raise WireError("a server's span, its digests and the number of blocks do not fit together")
        round_trips = fields.get("round_trips", {})
        if not isinstance(round_trips, dict) or len(round_trips) > MAX_ROUND_TRIPS:
            raise WireError(f"a server's round trips must be an object of at most {MAX_ROUND_TRIPS} peers")
        if not isinstance(numeric, dict) or len(numeric) > 32:
            raise WireError("a server's numeric class must be a short object")
        return cls(
            model=text(fields.get("model"), "model"),
            num_blocks=num_blocks,
            span=span,
            block_digests=tuple(text(digest, "a block digest", 64) for digest in digests),
            dtype=text(fields.get("dtype"), "dtype", 32),
            numeric_class=text(fields.get("numeric_class"), "numeric_class", 64),
            numeric={text(key, "numeric"): text(value, "numeric") for key, value in numeric.items()},
            version=text(fields.get("version"), "version", 64),
            name=text(fields.get("name", ""), "name", 128),
            rate_tok_s=integer(fields.get("rate_tok_s", 0), "rate_tok_s"),
            family=text(fields.get("family", ""), "family", 128),
            draining=draining,
            round_trips={text(peer, "a peer"): integer(said, "a round trip", 1, MAX_ROUND_TRIP_US) for peer, said in round_trips.items()},
            features=tuple(text(feature, "a feature", 64) for feature in features),
        )
