"""A hivemind DHT node on our own loop and daemon, with bounded parsing: store and find signed announcements."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgpack
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError, P2PHandlerError
from hivemind.proto import dht_pb2
from hivemind.utils.auth import AuthRole, AuthRPCWrapper
from hivemind.utils.serializer import MSGPackSerializer, SerializerBase
from hivemind.utils.timed_storage import get_dht_time

from swarmtune.discovery.records import MAX_RECORD_BYTES, Announcement
from swarmtune.errors import WireError
from swarmtune.transport.base import TransportError

logger = logging.getLogger(__name__)

DICTIONARY_CODE = 0x50
MAX_DICTIONARY_BYTES = 1 << 22
MAX_ENTRIES = 4096
FIND_TIMEOUT_S = 8.0
START_TIMEOUT_S = 15.0
PUBLISH_TIMEOUT_S = 15.0
PING_TIMEOUT_S = 4.0
CLOSE_TIMEOUT_S = 2.0
_FOREIGN = (P2PDaemonError, P2PHandlerError, OSError, EOFError, ValueError, RuntimeError)


@asynccontextmanager
async def _deadline(what: str, timeout_s: float) -> AsyncIterator[None]:
    """Bound one exchange with the DHT, and translate what hivemind raises.

    Raises:
        TransportError: it failed or took too long.
    """
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise TransportError(f"the DHT could not {what} within {timeout_s:.0f} s") from error
    except _FOREIGN as error:
        raise TransportError(f"the DHT could not {what}: {type(error).__name__}: {str(error)[:200]}") from error


class BoundedSerializer(SerializerBase):
    """MessagePack as the DHT writes it, read with limits: no extension types but one flat dictionary of records."""

    @staticmethod
    def dumps(obj: object) -> bytes:
        """As the library does."""
        return MSGPackSerializer.dumps(obj)

    @staticmethod
    def loads(buf: bytes) -> object:
        """Read one value.

        Raises:
            WireError: it is too large, nested or malformed.
        """
        if len(buf) > MAX_DICTIONARY_BYTES:
            raise WireError("a DHT value is too large")
        try:
            return msgpack.unpackb(buf, ext_hook=_read_dictionary, raw=False, strict_map_key=True)
        except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
            raise WireError("a DHT value is malformed") from error


def _refuse(code: int, data: bytes) -> object:
    raise WireError(f"a DHT value holds extension type {code}")


def _read_dictionary(code: int, data: bytes) -> object:
    if code != DICTIONARY_CODE:
        _refuse(code, data)
    fields = msgpack.unpackb(data, ext_hook=_refuse, raw=False)
    if not isinstance(fields, list) or len(fields) != 3 or not isinstance(fields[2], list) or len(fields[2]) > MAX_ENTRIES:
        raise WireError("a DHT dictionary is malformed")
    with DictionaryDHTValue(MAX_ENTRIES).freeze() as dictionary:
        for entry in fields[2]:
            if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], str) or not isinstance(entry[1], bytes):
                raise WireError("a DHT dictionary entry is malformed")
            expires_at = float(entry[2])
            if not math.isfinite(expires_at):
                raise WireError("a DHT dictionary entry has no expiry")
            dictionary.store(entry[0], entry[1], expires_at)
        return dictionary


class AnnouncementValidator(RecordValidatorBase):
    """Accepts only our records, under their model's key and their owner's subkey, with exactly the expiry that the owner signed.

    So a stranger can neither fill a node with junk nor replace another server's record, nor delay its renewal by a later expiry.
    """

    def validate(self, record: DHTRecord) -> bool:
        """Whether the record may be stored or believed."""
        try:
            value = msgpack.unpackb(record.value, ext_hook=_refuse, raw=False, max_bin_len=MAX_RECORD_BYTES)
            subkey = msgpack.unpackb(record.subkey, ext_hook=_refuse, raw=False, max_str_len=256)
            if not isinstance(value, bytes) or not isinstance(subkey, str):
                return False
            announcement = Announcement.open(value)
        except (WireError, ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
            logger.debug("refused a DHT record: %s", error)
            return False
        key = DHTID.generate(source=dht_key(announcement.info.model)).to_bytes()
        return record.key == key and subkey == announcement.peer and record.expiration_time == announcement.expires_at


def dht_key(model: str) -> str:
    """Where the servers of a model announce themselves."""
    return f"swarmtune.v1.{model}"


class DirectoryNode:
    """One DHT participant over an existing daemon."""

    def __init__(self) -> None:
        self._node: DHTNode | None = None

    async def start(self, p2p: P2P, initial_peers: list[str], *, client: bool) -> None:
        """Join the DHT of ``initial_peers``, which the daemon must already have been told how to reach."""
        DHTProtocol.serializer = BoundedSerializer  # before any handler listens: the library's own has no bounds
        async with _deadline("start", START_TIMEOUT_S):
            self._node = await DHTNode.create(
                p2p,
                initial_peers=initial_peers,
                client_mode=client,
                record_validator=AnnouncementValidator(),
                ensure_bootstrap_success=False,
                strict=False,
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                wait_timeout=3.0,
                bootstrap_timeout=3.0,
                # A first question may come before the daemon has learnt where to find whom it asks: that must not make it deaf to the answer.
                blacklist_time=0.0,
            )

    async def rebind(self, p2p: P2P) -> None:
        """Go on over another daemon of the same identity: records and neighbours stay, and others know this node as before.

        Raises:
            TransportError: the daemon does not take the handlers.
        """
        node = self._joined()
        node.p2p = node.protocol.p2p = p2p
        if not node.protocol.client_mode:
            async with _deadline("go on", START_TIMEOUT_S):
                await node.protocol.add_p2p_handlers(p2p, AuthRPCWrapper(node.protocol, AuthRole.SERVICER, node.protocol.authorizer))

    @property
    def started(self) -> bool:
        """Whether this participant can store and find."""
        return self._node is not None

    async def greet(self, peer: str) -> None:
        """Meet a peer that was not there at the start."""
        async with _deadline("greet a peer", FIND_TIMEOUT_S):
            await self._joined().protocol.call_ping(PeerID.from_base58(peer))

    async def publish(self, announcement: Announcement, record: bytes) -> bool:
        """Store a sealed record under its model and peer until it expires."""
        async with _deadline("store a record", PUBLISH_TIMEOUT_S):
            key, expires_at = dht_key(announcement.info.model), announcement.expires_at
            return bool(await self._joined().store(key, record, expiration_time=expires_at, subkey=announcement.peer))

    async def find(self, model: str) -> list[Announcement]:
        """The live announcements of a model. Nothing in them is more than their owners' word."""
        async with _deadline("find servers", FIND_TIMEOUT_S):
            found = await self._joined().get(dht_key(model), latest=True)
        if found is None or not isinstance(found.value, dict):
            return []
        announcements = []
        for entry in found.value.values():
            try:
                announcements.append(Announcement.open(entry.value))
            except (WireError, TypeError) as error:
                logger.debug("ignored a DHT record: %s", error)
        return [announcement for announcement in announcements if announcement.expires_at > get_dht_time()]

    async def clock_ahead(self, peer: str) -> tuple[float, float]:
        """Seconds by which a peer's clock is ahead of ours, by its word, and how far that can be off: half a round trip."""
        protocol = self._joined().protocol
        request = dht_pb2.PingRequest(peer=protocol.node_info)
        async with _deadline("ask a peer for its time", PING_TIMEOUT_S):
            began, began_at = time.monotonic(), get_dht_time()
            response = await protocol.get_stub(PeerID.from_base58(peer)).rpc_ping(request, timeout=PING_TIMEOUT_S)
            half_s = (time.monotonic() - began) / 2
        if not response.dht_time or not math.isfinite(response.dht_time):
            raise TransportError(f"peer {peer} does not tell its time")
        return response.dht_time - began_at - half_s, half_s

    def knows(self, peer: str) -> bool:
        """Whether a peer is among those that this participant asks; one that was silent for a while is not."""
        return self._node is not None and PeerID.from_base58(peer) in self._node.protocol.routing_table.peer_id_to_uid

    def _joined(self) -> DHTNode:
        if self._node is None:
            raise TransportError("this node is not part of the DHT now")
        return self._node

    async def close(self) -> None:
        """Leave the DHT."""
        if self._node is not None:
            node, self._node = self._node, None
            try:
                async with _deadline("say goodbye", CLOSE_TIMEOUT_S):  # it would wait for ever for a daemon that is gone
                    await node.shutdown()
            except TransportError as error:
                logger.debug("%s", error)
