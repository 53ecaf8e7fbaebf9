from dataclasses import replace

from swarmtune.remote.census import clashes_sentence, label, listed, models_sentence, numeric_differences, numeric_sentence, weight_clashes
from swarmtune.types import BlockSpan
from swarmtune.wire.messages import ServerInfo


def info(span: str, digests: str, **changes: object) -> ServerInfo:
    """A server whose weights of each block are named by one letter."""
    found = ServerInfo("model", 4, BlockSpan.parse(span), tuple(digests), "float32", "class", {"threads": "1"}, "0.1.0")
    return replace(found, **changes)  # type: ignore[arg-type]


def test_servers_that_agree_on_shared_blocks_do_not_clash() -> None:
    assert weight_clashes({"a": info("0:2", "xy"), "b": info("1:4", "yzw"), "c": info("0:4", "xyzw")}) == []


def test_clashes_are_maximal_spans_with_the_larger_group_first() -> None:
    servers = {"a": info("0:3", "xyz"), "b": info("0:2", "XY"), "c": info("0:4", "xyzw"), "d": info("3:4", "W")}
    assert weight_clashes(servers) == [(BlockSpan(0, 2), (("a", "c"), ("b",))), (BlockSpan(3, 4), (("c",), ("d",)))]
    assert clashes_sentence(servers) == "blocks 0:2: a, c against b; blocks 3:4: c against d"


def test_a_name_is_followed_by_the_peer_id_that_nobody_can_take() -> None:
    assert label("12D3KooWMEUhm3PfKTu7SMn27jjfqRMZDvWXWLvtJoGAokbb25mF", info("0:1", "x", name="lab")) == "lab (…okbb25mF)"
    assert label("short", info("0:1", "x")) == "short"
    assert listed("abcdefgh") == "a, b, c, d, e, f and 2 more"


def test_models_are_told_apart_by_digest_and_number_of_blocks() -> None:
    servers = {"a": info("0:1", "x"), "b": info("0:1", "x", model="other", num_blocks=2), "c": info("0:1", "x")}
    assert models_sentence(servers) == "model model with 4 blocks by a, c; model other with 2 blocks by b"


def test_only_facts_that_differ_are_named_and_a_missing_one_counts() -> None:
    servers = {
        "a": info("0:1", "x", numeric={"threads": "1", "torch": "2.13"}),
        "b": info("0:1", "x", numeric={"threads": "2", "torch": "2.13", "mode": "eager"}),
    }
    assert numeric_differences(servers) == {"mode": {"not said": ["a"], "eager": ["b"]}, "threads": {"1": ["a"], "2": ["b"]}}
    assert numeric_sentence(servers) == "mode is not said on a, eager on b; threads is 1 on a, 2 on b"
    assert numeric_sentence({"a": info("0:1", "x")}) == "they do not say in what"
