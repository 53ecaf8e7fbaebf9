"""Hidden states and gradients that go from server to server: who a call gets its tensor from, and to whom it hands what it computes."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace

from torch import Tensor

from swarmtune.errors import WireError
from swarmtune.wire.codec import Message
from swarmtune.wire.messages import CallKind, integer, text

PASSES_ON = "passes_on"
"""Feature of a server: it takes ``receive`` and ``send`` in a forward and in a ``kept_backward``, and the call ``deliver``."""
COPIES = "copies"
"""Feature of a server: it takes ``copy`` in a call with ``send``."""
_TOKEN = re.compile(r"[0-9a-f]{32}")
_TENSOR = {CallKind.FORWARD: "hidden", CallKind.KEPT_BACKWARD: "grad"}


@dataclass(frozen=True, slots=True)
class Receive:
    """The tensor of a call comes from another server, or from the caller itself, in a delivery.

    Attributes:
        token: that the delivery must name; made by the client, 32 hexadecimal digits.
        peer: who may deliver it beside the caller.
        size: bytes that it must have.
    """

    token: str
    peer: str
    size: int


@dataclass(frozen=True, slots=True)
class Send:
    """Where a call's hidden states or gradients are to be delivered.

    Attributes:
        peer: to whom.
        token: that the delivery names.
        copy: the caller gets them, too.
    """

    peer: str
    token: str
    copy: bool = False


@dataclass(frozen=True, slots=True)
class Relay:
    """Both ends of one call; ``None`` is the caller."""

    receive: Receive | None = None
    send: Send | None = None


def new_token() -> str:
    """A name that nobody can guess."""
    return secrets.token_hex(16)


def _token(value: object) -> str:
    if not isinstance(value, str) or not _TOKEN.fullmatch(value):
        raise WireError("a token must be 32 hexadecimal digits")
    return value


def with_relay(message: Message, relay: Relay) -> Message:
    """The message of a call whose tensor comes or goes another way."""
    fields, tensors = dict(message.fields), dict(message.tensors)
    if relay.receive is not None:
        del tensors[_TENSOR[CallKind(message.kind)]]
        fields["receive"] = [relay.receive.token, relay.receive.peer, relay.receive.size]
    if relay.send is not None:
        fields["send"] = [relay.send.peer, relay.send.token]
        if relay.send.copy:
            fields["copy"] = True
    return replace(message, fields=fields, tensors=tensors)


def take_relay(message: Message) -> tuple[Message, Relay]:
    """The same on the other side: what is left is a plain call, without its tensor where that has to be waited for.

    Raises:
        WireError: malformed, or of a kind that cannot.
    """
    if not {"receive", "send", "copy"} & set(message.fields):
        return message, Relay()
    if message.kind not in _TENSOR:
        raise WireError(f"a call {message.kind!r:.40} takes no receive and no send")
    fields = dict(message.fields)
    received, sent, copy = fields.pop("receive", None), fields.pop("send", None), fields.pop("copy", False)
    receive = send = None
    if received is not None:
        if not isinstance(received, list) or len(received) != 3 or _TENSOR[CallKind(message.kind)] in message.tensors:
            raise WireError("receive must be [token, peer, bytes], and the tensor is not in the call")
        receive = Receive(_token(received[0]), text(received[1], "a peer"), integer(received[2], "a size"))
    if not isinstance(copy, bool) or (copy and sent is None):
        raise WireError("copy must be true or false, and goes with send")
    if sent is not None:
        if not isinstance(sent, list) or len(sent) != 2:
            raise WireError("send must be [peer, token]")
        send = Send(text(sent[0], "a peer"), _token(sent[1]), copy)
    return replace(message, fields=fields), Relay(receive, send)


def with_tensor(message: Message, tensor: Tensor) -> Message:
    """The call with the tensor that has been delivered."""
    return replace(message, tensors={**message.tensors, _TENSOR[CallKind(message.kind)]: tensor})


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """A tensor for a call that waits for it under ``token``."""

    token: str
    tensor: Tensor

    def to_message(self) -> Message:
        """As it travels."""
        return Message(CallKind.DELIVER, {"token": self.token}, {"tensor": self.tensor})

    @classmethod
    def from_message(cls, message: Message) -> Delivery:
        """Check a peer's message.

        Raises:
            WireError: anything missing or superfluous.
        """
        if set(message.fields) != {"token"} or set(message.tensors) != {"tensor"}:
            raise WireError("a delivery holds a token and one tensor")
        return cls(_token(message.fields["token"]), message.tensors["tensor"])
