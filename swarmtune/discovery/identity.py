"""Peer identities: an Ed25519 key, and the libp2p peer id that contains its public half.

Source: the libp2p specification "Peer Ids and Keys" (a key is a protobuf of type and data; an Ed25519 peer id is the identity multihash of the
public key's protobuf), so a signature is verified with nothing but the peer id.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_PRIVATE_HEAD = bytes.fromhex("08011240")
_PEER_HEAD = bytes.fromhex("002408011220")
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key. ``peer_id`` is public; the rest is secret."""

    key: Ed25519PrivateKey

    @classmethod
    def generate(cls) -> Identity:
        """A new identity."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, data: bytes) -> Identity:
        """Read what ``to_bytes`` wrote.

        Raises:
            ValueError: it is not an Ed25519 key file of libp2p.
        """
        if len(data) != 68 or not data.startswith(_PRIVATE_HEAD):
            raise ValueError("not an Ed25519 identity file")
        return cls(Ed25519PrivateKey.from_private_bytes(data[4:36]))

    def to_bytes(self) -> bytes:
        """The key file that libp2p reads: 4 bytes of head, 32 of private key, 32 of public key."""
        return _PRIVATE_HEAD + self.key.private_bytes_raw() + self.key.public_key().public_bytes_raw()

    @property
    def peer_id(self) -> str:
        """The libp2p peer id in base 58."""
        return _encode_base58(_PEER_HEAD + self.key.public_key().public_bytes_raw())

    def sign(self, data: bytes) -> bytes:
        """64 bytes that ``verify`` accepts for ``data`` and this peer id."""
        return self.key.sign(data)


def verify(peer_id: str, data: bytes, signature: bytes) -> bool:
    """Whether the owner of ``peer_id`` signed ``data``. Peer ids of other key types are never believed."""
    try:
        raw = _decode_base58(peer_id)
        if len(raw) != 38 or not raw.startswith(_PEER_HEAD):
            return False
        Ed25519PublicKey.from_public_bytes(raw[6:]).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _encode_base58(data: bytes) -> str:
    number, digits = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        digits = _BASE58[digit] + digits
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + digits


def _decode_base58(text: str) -> bytes:
    if len(text) > 64:
        raise ValueError("a peer id is too long")
    number = 0
    for digit in text:
        number = number * 58 + _BASE58.index(digit)
    return b"\0" * (len(text) - len(text.lstrip("1"))) + number.to_bytes((number.bit_length() + 7) // 8, "big")
