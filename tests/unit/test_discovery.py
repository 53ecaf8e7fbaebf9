"""Identities, signed records and the DHT's values, as a stranger would forge them."""

from __future__ import annotations

import base64
import time
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import PeerID
from hivemind.utils.serializer import MSGPackSerializer
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmtune.discovery.dht import DICTIONARY_CODE, MAX_DICTIONARY_BYTES, MAX_ENTRIES, AnnouncementValidator, BoundedSerializer, dht_key
from swarmtune.discovery.identity import Identity, verify
from swarmtune.discovery.records import CLOCK_SKEW_S, MAX_LIFETIME_S, MAX_RECORD_BYTES, SIGNATURE_BYTES, Announcement, check_address, peer_of
from swarmtune.errors import WireError
from swarmtune.types import BlockSpan
from swarmtune.wire.frames import dump_json
from swarmtune.wire.messages import ServerInfo

NOW = 1_800_000_000.0
OWNER, STRANGER = Identity.generate(), Identity.generate()
INFO = ServerInfo("0123", 8, BlockSpan(0, 2), ("aa", "bb"), "float32", "cafe", {"torch": "2.13"}, "0.1.0", "lab", 100)


def address(identity: Identity = OWNER) -> str:
    return f"/ip4/127.0.0.1/tcp/31337/p2p/{identity.peer_id}"


def announcement(expires_at: float = NOW + 30, **changes: Any) -> Announcement:
    return replace(Announcement(OWNER.peer_id, INFO, (address(),), expires_at), **changes)


def forge(identity: Identity = OWNER, **changes: Any) -> bytes:
    """A record that is signed well and holds whatever is asked."""
    fields = {"peer": identity.peer_id, "info": INFO.to_json(), "addresses": [address(identity)], "expires_at": NOW + 30, **changes}
    payload = dump_json({key: value for key, value in fields.items() if value is not None})
    return identity.sign(payload) + payload


def test_an_identity_comes_back_from_its_file_and_signs_alike() -> None:
    again = Identity.from_bytes(OWNER.to_bytes())
    assert again.peer_id == OWNER.peer_id
    assert again.to_bytes() == OWNER.to_bytes()
    assert verify(OWNER.peer_id, b"data", again.sign(b"data"))


@pytest.mark.parametrize("data", [b"", b"x" * 68, OWNER.to_bytes()[:-1], OWNER.to_bytes() + b"x", b"\x09" + OWNER.to_bytes()[1:]], ids=len)
def test_what_is_no_identity_file_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="identity"):
        Identity.from_bytes(data)


def test_an_identity_does_not_show_its_secret() -> None:
    assert OWNER.to_bytes()[4:36].hex() not in repr(OWNER)


def test_peer_ids_are_those_of_libp2p_and_hivemind() -> None:
    for _ in range(20):
        identity = Identity.generate()
        peer = PeerID.from_base58(identity.peer_id)
        assert peer.to_bytes() == bytes.fromhex("002408011220") + identity.to_bytes()[36:]
        assert PeerID(peer.to_bytes()).to_base58() == identity.peer_id
        assert identity.peer_id.startswith("12D3Koo")


def test_only_the_owner_signs_for_a_peer_id() -> None:
    signature = OWNER.sign(b"data")
    assert verify(OWNER.peer_id, b"data", signature)
    assert not verify(STRANGER.peer_id, b"data", signature)
    assert not verify(OWNER.peer_id, b"date", signature)
    assert not verify(OWNER.peer_id, b"data", signature[:-1])


@pytest.mark.parametrize(
    "peer",
    ["", "0", "1" * 64, "z" * 100_000, OWNER.peer_id[:-1], "1" + OWNER.peer_id, "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "ü", "\ud800"],
)
def test_what_is_no_ed25519_peer_id_is_never_believed(peer: str) -> None:
    assert not verify(peer, b"data", OWNER.sign(b"data"))


def test_a_record_comes_back_as_it_was() -> None:
    assert Announcement.open(announcement().seal(OWNER), NOW) == announcement()


def test_a_record_with_any_byte_changed_is_refused() -> None:
    record = announcement().seal(OWNER)
    for position in range(len(record)):
        with pytest.raises(WireError):
            Announcement.open(record[:position] + bytes([record[position] ^ 1]) + record[position + 1 :], NOW)


def test_a_record_cut_at_any_byte_or_continued_is_refused() -> None:
    record = announcement().seal(OWNER)
    for length in range(len(record)):
        with pytest.raises(WireError):
            Announcement.open(record[:length], NOW)
    with pytest.raises(WireError):
        Announcement.open(record + b" ", NOW)


@pytest.mark.parametrize(
    "expires_at",
    [NOW - CLOCK_SKEW_S - 1, 0.0, -1.0, NOW + MAX_LIFETIME_S + CLOCK_SKEW_S + 1, 1e300, 10**400, True, "soon", None, [NOW]],
    ids=lambda at: repr(at)[:12],
)
def test_a_record_that_has_expired_or_would_live_too_long_is_refused(expires_at: object) -> None:
    Announcement.open(forge(), NOW)
    with pytest.raises(WireError, match="expired, or would live too long"):
        Announcement.open(forge(expires_at=expires_at), NOW)


@pytest.mark.parametrize(
    "addresses",
    [None, [], [address(STRANGER)], [address(), address(STRANGER)], [address()] * 17, address(), [1], [None], ["/ip4/1.2.3.4/tcp/1"],
     [address() + "/p2p-circuit"],
     [address().replace("/ip4/127.0.0.1", "/unix/tmp/x")], [address() + "\n"], [address().replace("127.0.0.1", "1;reboot")], ["x" * 1000]],
    ids=lambda addresses: repr(addresses)[:24],
)  # fmt: skip
def test_a_record_with_addresses_of_others_or_none_is_refused(addresses: object) -> None:
    with pytest.raises(WireError):
        Announcement.open(forge(addresses=addresses), NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"peer": None},
        {"peer": STRANGER.peer_id},
        {"peer": 1},
        {"peer": []},
        {"info": None},
        {"info": []},
        {"info": {}},
        {"info": {**INFO.to_json(), "span": [0, 9]}},
    ],
    ids=repr,
)
def test_a_record_that_is_signed_well_but_wrong_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        Announcement.open(forge(**changes), NOW)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_as_a_record_are_a_wire_error(data: bytes) -> None:
    for record in (data, OWNER.sign(data) + data):
        with pytest.raises(WireError):
            Announcement.open(record, NOW)


def test_a_record_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(WireError, match="size"):
        Announcement.open(bytes(MAX_RECORD_BYTES + 1), NOW)
    with pytest.raises(WireError, match="size"):
        Announcement.open(bytes(SIGNATURE_BYTES), NOW)


@pytest.mark.parametrize(
    "good",
    [
        address(),
        address().replace("ip4/127.0.0.1", "ip6/::1"),
        address().replace("ip4/127.0.0.1", "dns4/lab.example.org"),
        address().replace("ip4/127.0.0.1", "dns/gpu_1"),
        address().replace("/tcp/31337", "/udp/1/quic-v1"),
        address().replace("31337", "65535"),
    ],
)
def test_addresses_that_name_their_peer_are_taken(good: str) -> None:
    assert check_address(good) == good
    assert peer_of(good) == OWNER.peer_id


@pytest.mark.parametrize(
    "host", ["ip4/999.1.1.1", "ip4/1.2.3", "ip4/::1", "ip4/a.b", "ip6/1.2.3.4", "ip6/:::", "dns/a..b", "dns4/-a.b", "dns6/a-", "dns/a:b"]
)
def test_a_host_that_cannot_exist_is_refused(host: str) -> None:
    with pytest.raises(WireError, match="must look like"):
        check_address(address().replace("ip4/127.0.0.1", host))


@pytest.mark.parametrize("port", ["0", "65536", "99999", "٣"])
def test_a_port_that_cannot_exist_is_refused(port: str) -> None:
    with pytest.raises(WireError, match="must look like"):
        check_address(address().replace("31337", port))


@pytest.mark.parametrize(
    "bad", ["", "localhost:31337", "/ip4/1.2.3.4/tcp/1", f"/ip4/1.2.3.4/p2p/{OWNER.peer_id}", address() + "/", " " + address(), 5, None, b"/ip4"]
)
def test_other_addresses_are_refused_with_an_example(bad: object) -> None:
    with pytest.raises(WireError, match="must look like /ip4/ADDRESS/tcp/PORT/p2p/PEER_ID"):
        check_address(bad)


# What the DHT itself reads.


def dictionary(entries: list[Any], maxsize: Any = 4, latest: Any = 1e12) -> bytes:
    return bytes(msgpack.packb(msgpack.ExtType(DICTIONARY_CODE, msgpack.packb([maxsize, latest, entries]))))


def test_plain_values_and_the_librarys_own_dictionary_come_back() -> None:
    for value in (None, 5, "x", b"y", [1, [2]], {"a": 1.5}):
        assert BoundedSerializer.loads(BoundedSerializer.dumps(value)) == value
    stored = DictionaryDHTValue(5)
    stored.store("peer", b"record", time.time() + 50)
    found = BoundedSerializer.loads(MSGPackSerializer.dumps(stored))
    assert isinstance(found, DictionaryDHTValue)
    assert dict(found.items()) == dict(stored.items())


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\xc1", b"\xdc\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 5000, b"\x81" * 5000,
        b"\x91" * 5000 + b"\x00", b"\x01\x02",
        bytes(msgpack.packb(msgpack.ExtType(0x51, b"x"))), bytes(msgpack.packb(msgpack.ExtType(0x40, b"\x90"))),
        bytes(msgpack.packb([msgpack.ExtType(1, b"")])),
        bytes(msgpack.packb(msgpack.ExtType(DICTIONARY_CODE, b""))), bytes(msgpack.packb(msgpack.ExtType(DICTIONARY_CODE, msgpack.packb([1, 2])))),
        dictionary([["p", b"r", 1e12]] * (MAX_ENTRIES + 1)), dictionary([["p", b"r"]]), dictionary([[1, b"r", 1e12]]),
        dictionary([["p", "r", 1e12]]), dictionary([["p", b"r", "x"]]),
        dictionary([["p", b"r", None]]), dictionary([["p", b"r", []]]), dictionary([["p", b"r", float("nan")]]),
        dictionary([["p", b"r", float("inf")]]), dictionary(["p"]), dictionary({}),  # type: ignore[arg-type]
        dictionary([["p", msgpack.ExtType(DICTIONARY_CODE, b"\x93\x01\x02\x90"), 1e12]]), dictionary([["p", [[[]]], 1e12]]), b"\x82\xa1a\x01\xa1a",
        bytes(msgpack.packb({1: 2})),
    ],
    ids=lambda raw: raw[:16].hex() or "nothing",
)  # fmt: skip
def test_a_dht_value_that_is_nested_forged_or_malformed_is_a_wire_error(raw: bytes) -> None:
    with pytest.raises(WireError):
        BoundedSerializer.loads(raw)


def test_extension_types_within_extension_types_end_at_the_first() -> None:
    raw = b"\x90"
    for _ in range(300):
        raw = bytes(msgpack.packb(msgpack.ExtType(DICTIONARY_CODE, msgpack.packb([1, 1.0, [["p", b"", 1.0]]])[:-11] + raw)))
    with pytest.raises(WireError):
        BoundedSerializer.loads(raw)
    inner = msgpack.ExtType(DICTIONARY_CODE, msgpack.packb([1, 1.0, []]))
    with pytest.raises(WireError):
        BoundedSerializer.loads(bytes(msgpack.packb(msgpack.ExtType(DICTIONARY_CODE, msgpack.packb([1, 1.0, [["p", inner, 1e12]]])))))


def test_a_dht_value_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(WireError, match="too large"):
        BoundedSerializer.loads(bytes(MAX_DICTIONARY_BYTES + 1))


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda data: bytes(msgpack.packb(msgpack.ExtType(DICTIONARY_CODE, data)))))
def test_random_bytes_as_a_dht_value_give_a_value_or_a_wire_error(raw: bytes) -> None:
    try:
        BoundedSerializer.loads(raw)
    except WireError:
        pass


def dht_record(**changes: Any) -> DHTRecord:
    """The owner's record as it is stored, with some part of it changed."""
    expires_at = changes.pop("expires_at", None) or time.time() + 30
    value = changes.pop("sealed", None) or announcement(expires_at).seal(OWNER)
    key = DHTID.generate(source=dht_key(INFO.model)).to_bytes()
    fields = {"key": key, "subkey": MSGPackSerializer.dumps(OWNER.peer_id), "value": MSGPackSerializer.dumps(value), "expiration_time": expires_at}
    return DHTRecord(**{**fields, **changes})


def test_the_validator_accepts_what_an_owner_announces() -> None:
    assert AnnouncementValidator().validate(dht_record())


@pytest.mark.parametrize(
    "changes",
    [
        {"subkey": MSGPackSerializer.dumps(STRANGER.peer_id)}, {"subkey": b""}, {"subkey": b"\xc1"}, {"subkey": MSGPackSerializer.dumps(5)},
        {"subkey": MSGPackSerializer.dumps("x" * 300)},
        {"key": DHTID.generate(source="elsewhere").to_bytes()}, {"key": b""},
        {"expiration_time": 1e300}, {"expiration_time": float("inf")}, {"expiration_time": float("nan")}, {"expiration_time": time.time() + 35},
        {"expiration_time": 0.0},
        {"value": b""}, {"value": b"junk"}, {"value": MSGPackSerializer.dumps("text")}, {"value": MSGPackSerializer.dumps(b"x" * 200)},
        {"value": b"\x91" * 5000},
        {"value": bytes(msgpack.packb(msgpack.ExtType(DICTIONARY_CODE, b"\x90")))}, {"value": MSGPackSerializer.dumps(bytes(MAX_RECORD_BYTES + 1))},
        {"sealed": announcement(time.time() + 30).seal(STRANGER)}, {"expires_at": time.time() - 60}, {"expires_at": time.time() + 3600},
    ],
    ids=lambda changes: repr(changes)[:40],
)  # fmt: skip
def test_the_validator_refuses_foreign_keys_other_expiries_and_junk(changes: dict[str, Any]) -> None:
    assert AnnouncementValidator().validate(dht_record(**changes)) is False


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=150), st.binary(max_size=60), st.floats())
def test_the_validator_never_raises(value: bytes, subkey: bytes, expiration_time: float) -> None:
    assert AnnouncementValidator().validate(DHTRecord(b"key", subkey, value, expiration_time)) is False


def test_base64_of_a_record_is_not_a_record() -> None:
    with pytest.raises(WireError):
        Announcement.open(base64.b64encode(announcement().seal(OWNER)), NOW)
