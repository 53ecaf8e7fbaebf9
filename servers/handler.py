"""Door 7: bytes to a checked message to a job; any failure becomes a typed fault message."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from servers.executor import Busy, Executor, Expired
from servers.graphs import GraphGone, Graphs
from servers.mailbox import Mailbox
from servers.span import PREFIX, Span
from servers.stored import HOLD_S, StoredTensors
from servers.sums import Sums
from swarmtune.errors import NonFinite, UsageError, WireError
from swarmtune.transport.base import TransportError
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.compression import Codec, codec_of, expanded, feature, squeezed
from swarmtune.wire.frames import Encoded, Incoming
from swarmtune.wire.initial import InitialCall
from swarmtune.wire.kept import KeptCall
from swarmtune.wire.messages import (
    COMPILES,
    KEEPS_GRAPHS,
    MAX_HANDLE,
    STORES_TENSORS,
    SUMS_GRADIENTS,
    CallKind,
    Fault,
    FaultCode,
    ServerInfo,
    ServerTimes,
    SpanCall,
    SpanResult,
    TensorsMissing,
    integer,
    references,
)
from swarmtune.wire.relay import COPIES, PASSES_ON, Delivery, Relay, Send, take_relay, with_tensor

logger = logging.getLogger(__name__)

BACKWARD_PRIORITY, FORWARD_PRIORITY, INITIAL_PRIORITY = 1, 0, 2
"""Of one client, forwards go first: they have the longest way before them, and the last micro-batch ends the step. What they keep is bounded by what
the client lets be in flight. Jobs of one priority take about as long as each other."""
PASS_ON_S = 20.0
"""How long a delivery to the next server may take; after that the caller gets what was to be delivered."""
RECEIVE_S = 600.0
"""How long a call may wait for what it is to receive, whatever its caller says."""
CALLS = (CallKind.FORWARD, CallKind.BACKWARD, CallKind.KEPT_BACKWARD, CallKind.INITIAL)
"""What is done on the device."""


def one_line(detail: str) -> str:
    """What a fault or a log line can hold, whatever a peer or a library has put into it."""
    return "".join(character if character.isprintable() else " " for character in detail)


def _answer_codec(message: Message) -> tuple[Message, Codec]:
    """The call without the field that says how its hidden states, or their gradient, are to come back."""
    if "answer_codec" not in message.fields:
        return message, Codec.NONE
    fields = dict(message.fields)
    return replace(message, fields=fields), codec_of(fields.pop("answer_codec"))


class CallHandler:
    """Answers the calls of all peers.

    Attributes:
        tensors: what clients have sent before.
        clock: by which its work is timed; of any thread.
        mailbox: what other servers deliver.
        deliver: calls another server, by its peer id; ``None`` where this one cannot.
        round_trips: microseconds to other servers, by peer id, as whoever announces this one has measured them.
        draining: refuse new work, finish what is in flight.
        calls: forwards and backwards done so far.
        tokens: rows times sequence length of those calls.
        refused: calls answered by a fault.
    """

    def __init__(self, info: ServerInfo, span: Span, executor: Executor, *, max_tokens: int = 16384, max_sequence: int = 4096) -> None:
        self._info, self._span, self._executor = info, span, executor
        self._max_tokens, self._max_sequence = max_tokens, max_sequence
        self._rate_tok_s = 0.0
        self.clock: Callable[[], float] = time.perf_counter
        self.tensors, self.mailbox = StoredTensors(), Mailbox()
        self.deliver: Callable[[str, Encoded, float], Awaitable[Incoming]] | None = None
        self.round_trips: dict[str, int] = {}
        self.draining = False
        self.in_flight = 0
        self.calls = self.tokens = self.refused = 0

    @property
    def info(self) -> ServerInfo:
        """What this server says of itself now."""
        return replace(
            self._info, rate_tok_s=int(self._rate_tok_s), draining=self.draining, features=self._features(), round_trips=dict(self.round_trips)
        )

    def _features(self) -> tuple[str, ...]:
        own = (KEEPS_GRAPHS, STORES_TENSORS, SUMS_GRADIENTS, *(feature(codec) for codec in Codec if codec is not Codec.NONE))
        own = own if self._span.compiler is None else (*own, COMPILES)
        return own if self.deliver is None else (*own, PASSES_ON, COPIES)

    @property
    def held_bytes(self) -> int:
        """Of graphs and sums that wait for a client."""
        return self.graphs.held_bytes + self.sums.held_bytes

    @property
    def graphs(self) -> Graphs:
        """What forwards have left behind for their backwards."""
        return self._span.graphs

    @property
    def sums(self) -> Sums:
        """Gradients that wait for those of other micro-batches."""
        return self._span.sums

    def gone(self, peer: str) -> None:
        """The last connection of ``peer`` has ended: what it left behind is freed, and what a job that still runs for it leaves."""
        self.tensors.forget(peer)
        self._forget(peer)
        self._executor.after_this(partial(self._forget, peer))

    def _forget(self, peer: str) -> None:
        self.graphs.forget(peer)
        self.sums.forget(peer)

    async def __call__(self, peer: str, incoming: Incoming) -> Encoded:
        """Answer one call from ``peer``."""
        try:
            message, codec = _answer_codec(await expanded(decode(incoming)))
            reply = await squeezed(await self._dispatch(peer, message, codec), {"hidden": codec})
            self.refused += reply.kind == "fault"
            return encode(reply)
        except TensorsMissing as error:
            return encode(Fault(FaultCode.NO_TENSORS, str(error)).to_message())
        except WireError as error:
            fault = Fault(FaultCode.BAD_REQUEST, one_line(str(error)))
        except NonFinite as error:
            fault = Fault(FaultCode.NON_FINITE, error.detail, error.block)
        except UsageError as error:
            fault = Fault(FaultCode.BAD_REQUEST, one_line(str(error)))
        except GraphGone as error:
            return encode(Fault(FaultCode.NO_GRAPH, str(error)).to_message())
        except Busy as error:
            fault = Fault(FaultCode.BUSY, error.detail, retry_ms=math.ceil(error.retry_s * 1000))
        except Expired as error:
            fault = Fault(FaultCode.EXPIRED, str(error))
        except Exception as error:  # a defect of ours, or of the device; the caller can try another server
            logger.exception("a call of %s failed", peer)
            fault = Fault(FaultCode.INTERNAL, f"{type(error).__name__}: {one_line(str(error))[:500]}")
        self.refused += 1
        # Who is told to ask again does so several times a second; the line of each minute counts them.
        logger.log(logging.DEBUG if fault.code is FaultCode.BUSY else logging.INFO, "refused a call of %s: %s", peer, fault.detail)
        return encode(fault.to_message())

    async def _dispatch(self, peer: str, message: Message, codec: Codec) -> Message:
        if message.kind == CallKind.INFO:
            return self.info.to_message()
        if message.kind == CallKind.DELIVER:
            if await self.mailbox.deliver(peer, Delivery.from_message(message)):
                return Message("delivered")
            return Fault(FaultCode.NOT_HERE, "no call waits for this delivery").to_message()
        if message.kind not in CALLS:
            why = f"this server (swarmtune {self._info.version}) knows no call {message.kind[:40]!r}: update the older of the two sides"
            return Fault(FaultCode.UNSUPPORTED, why).to_message()
        if self.draining:
            return Fault(FaultCode.DRAINING, "this server is shutting down").to_message()
        self.in_flight += 1
        try:
            return await self._do(peer, *take_relay(message), codec)
        finally:
            self.in_flight -= 1

    async def _do(self, peer: str, message: Message, relay: Relay, codec: Codec) -> Message:
        """Get everything that the call needs, run it, pass on what is to be passed on."""
        shared = await self._shared(peer, message)
        if relay.receive is not None:
            if message.kind == CallKind.KEPT_BACKWARD:  # before those above have gone back for nothing
                self.graphs.check(peer, integer(message.fields.get("handle"), "a handle", 1, MAX_HANDLE))
            remaining_ms = integer(message.fields.get("remaining_ms"), "remaining_ms", 1, 1 << 32)
            began = time.monotonic()
            try:
                message = with_tensor(message, await self.mailbox.receive(peer, relay.receive, min(RECEIVE_S, remaining_ms / 1000)))
            except TimeoutError:
                return Fault(FaultCode.EXPIRED, "what the call was to receive did not come in time").to_message()
            left_ms = remaining_ms - int((time.monotonic() - began) * 1000)
            message = replace(message, fields={**message.fields, "remaining_ms": max(1, left_ms)})
        call: SpanCall | KeptCall | InitialCall
        if message.kind == CallKind.INITIAL:
            call = InitialCall.from_message(message)
        else:
            call = KeptCall.from_message(message) if message.kind == CallKind.KEPT_BACKWARD else SpanCall.from_message(message, shared)
        if call.model != self._info.model or not self._info.span.covers(call.span):
            held = f"this server holds blocks {self._info.span} of model {self._info.model}"
            return Fault(FaultCode.NOT_HERE, f"{held}, the call is for {call.span} of {call.model[:40]}").to_message()
        if isinstance(call, SpanCall):
            self._check_size(call)
        if isinstance(call, InitialCall):
            run = partial(self._span.initial, call)
            values = await self._executor.submit(run, priority=INITIAL_PRIORITY, timeout_s=call.remaining_ms / 1000, client=peer)
            return values.to_message()
        result = await self._execute(peer, call)
        return (await self._pass_on(result, relay.send, codec, call.remaining_ms / 1000) if relay.send is not None else result).to_message()

    async def _pass_on(self, result: SpanResult, send: Send, codec: Codec, timeout_s: float) -> SpanResult:
        """Deliver the hidden states, or their gradient, to the next server; what cannot be delivered goes back to the caller instead."""
        if result.hidden_BTH is None or self.deliver is None:
            return result
        try:
            request = encode(await squeezed(Delivery(send.token, result.hidden_BTH).to_message(), {"tensor": codec}), answer_bytes=0)
            answer = decode(await self.deliver(send.peer, request, min(timeout_s, PASS_ON_S)))
        except (TransportError, WireError) as error:
            logger.info("could not pass on to %s: %s", send.peer, one_line(str(error)))
            return result
        if answer.kind != "delivered":
            logger.info("could not pass on to %s: it did not take the delivery", send.peer)
            return result
        return replace(result, hidden_BTH=result.hidden_BTH if send.copy else None, sent=True)

    async def _shared(self, peer: str, message: Message) -> Mapping[str, Tensor]:
        """Keep what the message brings under a digest, and find what it leaves out, because it was sent before."""
        if message.kind not in (CallKind.FORWARD, CallKind.BACKWARD):
            return {}
        brought, left_out = references(message)
        if brought:
            self.tensors.put(peer, brought)
        return await self.tensors.wait_for(peer, left_out, HOLD_S) if left_out else {}

    def _check_size(self, call: SpanCall) -> None:
        batch, sequence = call.hidden_BTH.shape[:2]
        prefix = max((kwarg.tensor.shape[-2] for kwarg in call.kwargs if kwarg.name in PREFIX and kwarg.tensor.dim() > 1), default=0)
        if sequence + prefix > self._max_sequence or batch * sequence > self._max_tokens:
            raise WireError(
                f"this server takes at most {self._max_tokens} tokens and sequences of at most {self._max_sequence}, got {batch} x {sequence}"
                + (f" behind a prefix of {prefix}" if prefix else "")
                + ": lower micro_batch_tokens or the sequence length, or raise the server's max_tokens and max_sequence"
            )

    async def _execute(self, peer: str, call: SpanCall | KeptCall) -> SpanResult:
        if isinstance(call, KeptCall):
            run, priority, shape = partial(self._span.kept_backward, call, peer), BACKWARD_PRIORITY, call.grad_BTH.shape
        elif call.grad_BTH is not None:
            run, priority, shape = partial(self._span.backward, call, peer), BACKWARD_PRIORITY, call.grad_BTH.shape
        else:
            run, priority, shape = partial(self._span.forward, call, peer), FORWARD_PRIORITY, call.hidden_BTH.shape
        tokens = shape[0] * shape[1]
        job = self._timed(run, tokens * len(call.span), self.clock())
        result = await self._executor.submit(job, priority=priority, timeout_s=call.remaining_ms / 1000, client=peer)
        self.calls += 1
        self.tokens += tokens
        return result

    def _timed(self, run: Callable[[], SpanResult], token_blocks: int, arrived: float) -> Callable[[], SpanResult]:
        def job() -> SpanResult:
            began, before = self.clock(), self._span.block_forwards
            result = run()
            seconds = self.clock() - began
            rate = token_blocks / max(seconds, 1e-6)
            self._rate_tok_s = rate if not self._rate_tok_s else 0.8 * self._rate_tok_s + 0.2 * rate
            return replace(result, times=ServerTimes(round((began - arrived) * 1e6), round(seconds * 1e6), self._span.block_forwards - before))

        return job
