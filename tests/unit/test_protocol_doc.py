"""``docs/protocol.md`` says what the code does: its example is recorded from a real connection, its tables are compared with the code.

``python tests/unit/test_protocol_doc.py`` prints the generated blocks, to be pasted when the protocol changes on purpose.
"""

from __future__ import annotations

import ast
import asyncio
import hashlib
import inspect
import re
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import msgpack
import pytest
import torch
from hivemind.dht.routing import DHTID

from servers import announce, executor, handler, mailbox, program, span, stored, sums
from servers.dropout import DropoutPlan, keep_mask, site_keys
from swarmtune.adapters import tuners
from swarmtune.adapters.tuners import TUNERS
from swarmtune.discovery import dht, records
from swarmtune.discovery.identity import Identity
from swarmtune.discovery.records import Announcement
from swarmtune.errors import WireError
from swarmtune.remote import route
from swarmtune.skeleton import VOLATILE_KEYS
from swarmtune.transport import connection, hivemind
from swarmtune.transport.connection import Connection
from swarmtune.types import AXES, BlockSpan
from swarmtune.wire import codec, compression, frames, initial, kept, messages, relay, tensors
from swarmtune.wire.codec import decode, encode
from swarmtune.wire.frames import PREFIX, TRAILER, Encoded, FrameKind, Incoming, Prefix, WireLimits, dump_json
from swarmtune.wire.initial import InitialResult
from swarmtune.wire.messages import AdapterSpec, CallKind, CallKwarg, Fault, FaultCode, ServerInfo, SpanCall, SpanResult
from swarmtune.wire.tensors import WireDtype

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        frames,
        tensors,
        codec,
        messages,
        initial,
        tuners,
        connection,
        hivemind,
        records,
        announce,
        executor,
        program,
        span,
        route,
        stored,
        sums,
        mailbox,
        handler,
        compression,
    )
}
COMPLETE = (frames, tensors, codec, messages, initial, kept, relay, records, program)
"""Every number that one of these modules names stands in the document."""

MODEL = "0123456789abcdef"
INFO = ServerInfo(MODEL, 4, BlockSpan(2, 4), ("00" * 8, "11" * 8), "float32", "22" * 8, {"torch": "2.13.0"}, "0.1.0", "lab", 1000)
CALL = SpanCall(
    span=BlockSpan(2, 4),
    model=MODEL,
    hidden_BTH=torch.tensor([[[0.0, 1.0], [-1.0, 0.5]]]),
    kwargs=(CallKwarg("attention_mask", torch.tensor([[1, 1]]), {"batch": 0, "sequence": 1}, BlockSpan(2, 4), False),),
    remaining_ms=60_000,
)
TARGETS = ["0.self_attention.query_key_value", "1.self_attention.query_key_value"]
ADAPTER = {
    "fields": {"fan_in_fan_out": False, "lora_alpha": 16, "lora_bias": False, "lora_dropout": 0.5, "r": 8, "use_dora": False, "use_rslora": False},
    "modules": TARGETS,
    "patterns": {"alpha_pattern": {}, "rank_pattern": {TARGETS[1]: 4}},
    "peft_type": "LORA",
}
SITE = "self_attention.query_key_value.lora_dropout.default"


def section(title: str) -> str:
    """The text below a heading, up to the next heading."""
    text = DOCUMENT.read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None, f"the document has no section {title!r}"
    return found[1]


def flat(title: str) -> str:
    """The same on one line."""
    return " ".join(section(title).split())


def tables(title: str) -> list[list[list[str]]]:
    """The tables of a section: rows of cells without their backticks; heads and rules are left out."""
    found: list[list[list[str]]] = []
    previous = ""
    for line in section(title).splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                found.append([])
            found[-1].append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
        previous = line
    return [table[2:] for table in found]


def column(title: str, *, table: int = 0, index: int = 0) -> list[str]:
    return [row[index] for row in tables(title)[table]]


def code_block(title: str) -> str:
    found = re.search(r"```text\n(.*?)```", section(title), re.DOTALL)
    assert found is not None, f"section {title!r} has no block of text"
    return found[1]


def layout(packed: struct.Struct) -> list[tuple[str, str]]:
    """Offset and size of each field."""
    sizes = [struct.calcsize("<" + code) for code in re.findall(r"\d*[a-zA-Z]", packed.format)]
    return [(str(sum(sizes[:index])), str(size)) for index, size in enumerate(sizes)]


def number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def named_numbers(module: ModuleType) -> dict[str, float]:
    """The numbers that a module itself names in capitals."""
    names = [
        target.id
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id.isupper() and not target.id.startswith("_")
    ]
    return {name: value for name in names if isinstance(value := getattr(module, name), int | float)}


async def record() -> list[tuple[str, bytes]]:
    """A handshake and one call between two real connections, as the bytes between them: (direction, bytes)."""
    written: dict[str, bytearray] = {">": bytearray(), "<": bytearray()}

    async def handler(peer: str, incoming: Incoming) -> Encoded:
        call = SpanCall.from_message(decode(incoming))
        return encode(SpanResult(call.hidden_BTH * 2).to_message())

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        while data := await reader.read(1 << 16):
            written[direction] += data
            writer.write(data)
        writer.close()

    near, far = socket.socketpair(), socket.socketpair()
    ends = [await asyncio.open_connection(sock=end) for end in (*near, *far)]
    copying = [asyncio.create_task(copy(ends[1][0], ends[2][1], ">")), asyncio.create_task(copy(ends[2][0], ends[1][1], "<"))]
    client, server = Connection(*ends[0], peer="server"), Connection(*ends[3], peer="client", handler=handler)
    try:
        await asyncio.gather(client.open(), server.open())
        greeted = {direction: len(data) for direction, data in written.items()}
        reply = await client.request(encode(CALL.to_message()), 10.0)
        assert torch.equal(SpanResult.from_message(decode(reply), CALL).hidden_BTH, CALL.hidden_BTH * 2)  # type: ignore[arg-type]
    finally:
        await client.close()
        await server.close()
        await asyncio.gather(*copying)
        for _, writer in ends[1:3]:
            writer.close()
            await writer.wait_closed()
    up, down = bytes(written[">"]), bytes(written["<"])
    return [(">", up[: greeted[">"]]), ("<", down[: greeted["<"]]), (">", up[greeted[">"] :]), ("<", down[greeted["<"] :])]


def rows(data: bytes) -> list[str]:
    """Thirty-two bytes a line, in hexadecimal and as text."""
    lines = []
    for start in range(0, len(data), 32):
        part = data[start : start + 32]
        lines.append(f"  {part.hex(' '):<95}  {''.join(chr(byte) if 32 <= byte < 127 else '.' for byte in part)}".rstrip())
    return lines


def annotated(recorded: list[tuple[str, bytes]]) -> str:
    """Frame by frame: what it is, its prefix, its payload."""
    lines = []
    for direction, data in recorded:
        who = "client to server" if direction == ">" else "server to client"
        while data:
            prefix = Prefix.unpack(data[: PREFIX.size])
            payload, rest = data[PREFIX.size : PREFIX.size + prefix.payload_bytes], data[PREFIX.size + prefix.payload_bytes :]
            lines.append(f"{who}: {prefix.kind.name}, {prefix.payload_bytes} bytes of payload, request {prefix.request_id}{_note(prefix, payload)}")
            lines += [*rows(data[: PREFIX.size]), *(rows(payload) if any(payload) else [f"  {len(payload)} times 00"])]
            data = rest
    return "\n".join(lines) + "\n"


def _note(prefix: Prefix, payload: bytes) -> str:
    if prefix.kind is FrameKind.END:
        body_bytes, checksum = TRAILER.unpack(payload)
        return f"; body of {body_bytes} bytes, checksum {checksum:08x}"
    if prefix.kind is FrameKind.DATA:
        return "; padding" if not any(payload) else "; tensor data"
    return ""


def kept_LF() -> torch.Tensor:
    """Two lines of sixteen features of the example's mask."""
    return keep_mask(site_keys(DropoutPlan(7, 2), 3, SITE, 0, 1), 2, 16, 0.5, torch.device("cpu"))


def kept_by_the_text(line: int, feature: int, p: float) -> bool:
    """Whether an element of the example is kept, by the steps of the document and nothing of ours."""

    def mix(word: int) -> int:
        word ^= word >> 16
        word = word * 0x7FEB352D % 2**32
        word ^= word >> 15
        word = word * 0x846CA68B % 2**32
        return word ^ word >> 16

    def words(text: bytes) -> tuple[int, ...]:
        return struct.unpack("<4I", hashlib.blake2b(text, digest_size=16, person=b"swarmtune/drop/1").digest())

    message = struct.pack("<3Q", 7, 3, 0) + SITE.encode()
    k = words(message + b"\0" + struct.pack("<Q", 2))
    a, b = mix(mix((line + k[0]) % 2**32) ^ k[2]), mix(mix((line + k[1]) % 2**32) ^ k[3])
    h = a ^ mix((feature + words(message)[0]) % 2**32)
    h ^= h >> 16
    h = (h * 0x7FEB352D + b) % 2**32
    h ^= h >> 15
    h = h * 0x846CA68B % 2**32
    return h ^ 0x80000000 >= round(p * 2**32)


def tuner_rows() -> list[str]:
    """The table of adapter types, a line each."""

    def cell(*parts: str) -> str:
        return " " + "; ".join(part for part in parts if part) + " |" if any(parts) else " |"

    def quoted(names: Iterable[str], bounds: Mapping[str, int] | None = None) -> str:
        return ", ".join(f"`{name}`" + (f" (to {bounds[name]})" if bounds and name in bounds else "") for name in names)

    found = []
    for kind, tuner in sorted(TUNERS.items()):
        if kind == "TRAINABLE_TOKENS":
            continue
        made = ("indices of all blocks" if tuner.joint else "indices") if tuner.materialised else ""
        made += "".join(f", `{name}`" for name in tuner.computed)
        found.append(
            f"| {kind} |"
            + cell(quoted(tuner.fields, tuner.bounds))
            + cell(quoted(tuner.patterns))
            + cell(quoted((tuner.dropout,)) if tuner.dropout else "")
            + cell(made, "integers travel" if tuner.integers else "")
            + cell(quoted(tuner.derived), "with `rng`" if tuner.draws else "")
        )
    return found


def vectors() -> str:
    """Values to test another implementation with."""
    identity = Identity.from_bytes(bytes.fromhex("08011240") + bytes(range(32)) + bytes(32))
    address = f"/ip4/10.0.0.1/tcp/31337/p2p/{identity.peer_id}"
    sealed = Announcement(identity.peer_id, INFO, (address,), 1800000000.0).seal(identity)
    key = dht.dht_key(MODEL)
    return "\n".join(
        [
            "private key   " + bytes(range(32)).hex(),
            "peer id       " + identity.peer_id,
            "DHT key       " + key,
            "DHT id        " + DHTID.generate(source=key).to_bytes().hex(),
            "subkey        " + msgpack.packb(identity.peer_id)[:6].hex(" ") + " ...",
            "record        signature, then the JSON",
            "  signature   " + sealed[:64].hex(),
            *("  " + sealed[64:].decode()[start : start + 140] for start in range(0, len(sealed) - 64, 140)),
            "adapter       LoRA of rank 8 and 4 on two modules",
            *("  " + dump_json(ADAPTER).decode()[start : start + 140] for start in range(0, len(dump_json(ADAPTER)), 140)),
            "  digest      " + AdapterSpec.of(ADAPTER).digest,
            f"dropout       seed 7, block 3, call 0, row 2, site {SITE}",
            "  s, k0...k3  " + " ".join(f"{key & 0xFFFFFFFF:08x}" for key in site_keys(DropoutPlan(7, 2), 3, SITE, 0, 1)),
            *(f"  line {line}, p=0.5, features 0 to 15: " + " ".join(str(int(kept)) for kept in row) for line, row in enumerate(kept_LF())),
            "",
        ]
    )


def test_the_worked_example_is_what_two_connections_say() -> None:
    assert code_block("Worked example") == annotated(asyncio.run(record()))


def test_the_test_values_are_what_the_code_computes() -> None:
    assert code_block("Test values") == vectors()


@pytest.mark.parametrize(("title", "packed"), [("Frames", PREFIX), ("Trailer", TRAILER)])
def test_the_layouts_are_those_of_the_code(title: str, packed: struct.Struct) -> None:
    assert [(row[0], row[1]) for row in tables(title)[0]] == layout(packed)


def test_the_prefix_holds_the_magic_and_the_version_that_the_document_gives() -> None:
    values = column("Frames", index=3)
    assert values[:2] == [frames.MAGIC.hex(" "), str(frames.VERSION)]


def test_the_frame_kinds_are_those_of_the_code() -> None:
    assert [(row[0], row[1]) for row in tables("Frame kinds")[0]] == [(str(int(kind)), kind.name) for kind in FrameKind]


def test_the_dtype_codes_and_sizes_are_those_of_the_code() -> None:
    expected = [(str(int(code)), code.name, str(tensors.TensorSpec("x", code, (1,)).payload_bytes)) for code in WireDtype]
    assert [(row[0], row[1], row[2]) for row in tables("Element types")[0]] == expected


def test_the_numbers_are_those_of_the_code() -> None:
    for name, stated, _ in (row for table in tables("Numbers") for row in table):
        owner, _, attribute = name.partition(".")
        value = getattr(WireLimits(), attribute) if owner == "WireLimits" else getattr(MODULES[owner], attribute)
        assert stated == number(value), f"the document gives {name} = {stated}, the code {number(value)}"


def test_no_number_of_the_protocol_is_missing() -> None:
    stated = {row[0] for table in tables("Numbers") for row in table}
    expected = {f"{module.__name__.rpartition('.')[2]}.{name}" for module in COMPLETE for name in named_numbers(module)}
    expected |= {f"WireLimits.{limit.name}" for limit in fields(WireLimits)}
    assert expected - stated == set()


def test_a_number_that_the_text_names_stands_in_the_table() -> None:
    stated = {row[0].rpartition(".")[2] for row in tables("Numbers")[0]}
    quoted = set(re.findall(r"`([A-Z]+_[A-Z_]+)`", DOCUMENT.read_text(encoding="utf-8")))
    assert quoted
    assert quoted <= stated


def test_the_fault_codes_and_what_a_client_does_are_those_of_the_code() -> None:
    again = {FaultCode.NO_GRAPH: "the inputs again", FaultCode.NO_TENSORS: "the call with all of its tensors"}
    others = {**again, **dict.fromkeys(messages.DETERMINISTIC, "raise")}
    expected = [(str(code), others.get(code, "another server")) for code in FaultCode]
    assert [(row[0], row[2]) for row in tables("Faults")[0]] == expected


def test_the_fields_of_a_fault_are_those_of_the_code() -> None:
    quoted = ", ".join(f"`{name}`" for name in Fault(FaultCode.BUSY, "", retry_ms=1).to_message().fields)
    assert f"The fields are {quoted}:" in flat("Faults")


def test_the_call_kinds_are_those_of_the_code() -> None:
    assert column("Calls and replies") == [str(kind) for kind in CallKind]


def test_the_fields_of_a_call_are_those_of_the_code() -> None:
    assert set(column("forward and backward")) == messages._CALL_FIELDS
    assert column("Kwargs", table=0) == ["name", "axes", "blocks", "requires_grad", "digest"]
    assert len(CALL.kwargs[0].to_json()) == 4
    assert len(replace(CALL.kwargs[0], digest="0" * 32).to_json()) == 5
    assert ", ".join(f"`{axis}`" for axis in AXES) in section("Kwargs")


def test_the_fields_of_a_backward_through_a_kept_graph_are_those_of_the_code() -> None:
    assert set(column("kept_backward")) == kept._FIELDS
    assert f"`{messages.KEEPS_GRAPHS}` is `keep` and `release`" in flat("info")
    assert "`handle`" in flat("kept_backward")
    assert f"`{messages.SUMS_GRADIENTS}` is `sum`" in flat("info")
    assert f"`{messages.COMPILES}` is `compile`" in flat("info")
    assert f"`{relay.PASSES_ON}` is `receive` and `send`" in flat("info")
    assert f"`{relay.COPIES}` is `copy`" in flat("info")
    assert column("Codecs") == [str(codec) for codec in compression.Codec if codec != "none"]
    assert all(f"`{compression.feature(codec)}`" in flat("info") for codec in compression.Codec if codec != "none")
    assert column("deliver") == ["receive", "send", "copy"]
    assert f"`{messages.STORES_TENSORS}` is `digest`" in flat("info")


def test_the_description_of_a_server_has_the_fields_of_the_code() -> None:
    assert column("info") == [field.name for field in fields(ServerInfo)] == list(replace(INFO, round_trips={"peer": 1}).to_json())


def test_the_fields_of_a_call_for_first_values_are_those_of_the_code() -> None:
    assert set(column("initial")) == initial._INITIAL_FIELDS
    assert {str(CallKind.INITIAL): InitialResult(()).to_message().kind}.items() <= {row[0]: row[1] for row in tables("Calls and replies")[0]}.items()


def test_the_adapter_configurations_have_the_fields_of_the_code() -> None:
    rows = tables("Adapter configurations")[0]
    assert {row[0] for row in rows if row[1] == "all"} == set(tuners.SPEC_FIELDS)
    assert {row[1]: (row[0],) for row in rows if row[1] != "all"} == tuners._EXTRA


def test_the_adapter_types_are_those_of_the_code() -> None:
    stated = [line for line in section("Adapter configurations").splitlines() if re.match(r"\| [A-Z]", line)]
    assert stated == tuner_rows()


def test_the_example_adapter_is_one_that_a_server_takes() -> None:
    tuners.rebuild(AdapterSpec.of(ADAPTER), "transformer.h.")
    with pytest.raises(WireError):
        tuners.rebuild(AdapterSpec.of({**ADAPTER, "more": 1}), "transformer.h.")


def test_the_example_mask_follows_from_the_steps_that_the_document_gives() -> None:
    by_the_text = [[kept_by_the_text(line, feature, 0.5) for feature in range(16)] for line in range(2)]
    assert kept_LF().tolist() == by_the_text
    for word in ("0x7feb352d", "0x846ca68b", "`swarmtune/drop/1`", f"`{SITE}`"):
        assert word in section("Dropout")


def test_names_that_the_document_quotes_are_those_of_the_code() -> None:
    assert f"`{hivemind.STREAM_NAME}`" in section("Stream")
    hello = dump_json({"versions": list(connection.PROTOCOL_VERSIONS), "features": list(connection.FEATURES)}).decode()
    assert f"`{hello}`" in section("Handshake")
    assert ", ".join(f"`{key}`" for key in sorted(VOLATILE_KEYS)) in flat("Digests")
    assert f"`{dht.dht_key('<model>')}`" in section("DHT record")
    assert f"`{records._ADDRESS.pattern}`" in section("DHT record")
    assert ", ".join(f"`{name}`" for name in sorted(span.NOT_ARGUMENTS)) in flat("Kwargs")
    for name in (*span.PREFIX, *span.ROW_ARGUMENTS):
        assert f"`{name}`" in section("Kwargs")
    assert f"`0x{dht.DICTIONARY_CODE:02x}`" in section("DHT record")


if __name__ == "__main__":
    print(annotated(asyncio.run(record())))
    print(vectors())
    print("\n".join(tuner_rows()))
