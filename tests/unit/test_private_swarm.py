"""The YAML file of a private swarm, the commands for several machines, and whose processes ``down`` may end. Nothing is started here."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from servers.config import read_words
from servers.private_swarm import born_at, main
from servers.swarm_plan import read_plan
from swarmtune.config import load_config
from swarmtune.discovery.identity_file import ensure_identity
from swarmtune.errors import UsageError

POCKET = "model: pkg://swarmtune/assets/pocket_bloom\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "swarm.yaml"
    path.write_text(text)
    return path


def test_a_plan_has_shared_keys_own_keys_names_and_a_state_directory(tmp_path: Path) -> None:
    plan = read_plan(
        written(
            tmp_path,
            POCKET + 'dtype: float32\nservers: [{blocks: "0:2", port: 5}, {blocks: "2:4", name: tail, dtype: bfloat16, announce: [1.2.3.4]}]',
        )
    )
    assert [(member.name, member.config.blocks, member.config.dtype.value, member.config.port) for member in plan.members] == [
        ("server-0", "0:2", "float32", 5),
        ("tail", "2:4", "bfloat16", 0),
    ]
    assert plan.state == tmp_path / "swarm.state"
    assert plan.warnings == ()
    assert plan.members[1].addresses(7, "12D3KooWx" + "x" * 40) == [f"/ip4/1.2.3.4/tcp/7/p2p/12D3KooWx{'x' * 40}"]


def test_a_model_beside_the_file_is_found_from_anywhere(tmp_path: Path, bloom: Path) -> None:
    (tmp_path / "model").symlink_to(bloom)
    plan = read_plan(written(tmp_path, 'model: model\nservers: [{blocks: "0:4"}]'))
    assert plan.model == str(tmp_path / "model")


def test_blocks_that_nobody_holds_are_a_warning_unless_another_swarm_is_joined(tmp_path: Path) -> None:
    text = POCKET + 'servers: [{blocks: "0:1"}, {blocks: "2:3"}]'
    assert read_plan(written(tmp_path, text)).warnings == ("nobody holds blocks 1:2, 3:4 of 0:4: training must wait until others serve them",)
    assert read_plan(written(tmp_path, text + "\ninitial_peers: [/ip4/1.2.3.4/tcp/1/p2p/x]")).warnings == ()


SENTENCES = {
    "": "must hold keys such as model and servers",
    "a: [": "is no YAML",
    POCKET: "servers must list at least one server",
    POCKET + "servers: 3": "servers must list at least one server",
    POCKET + "servers: [0]": "servers[0] must be a group of keys, got 0",
    POCKET + "servers: [{}]": "servers[0]: blocks must be given",
    POCKET + "servers: [{blocks: 2:4}]": "servers[0]: blocks must be a quoted string such as",
    'servers: [{blocks: "0:4"}]': "servers[0]: model must be given",
    POCKET + 'dtpye: float32\nservers: [{blocks: "0:4"}]': "there is no key dtpye; did you mean dtype?",
    POCKET + 'port: 5\nservers: [{blocks: "0:4"}]': "there is no key port (it stands below servers)",
    POCKET + 'servers: [{blocks: "0:4", prot: 4}]': "there is no key servers[0].prot; did you mean port?",
    POCKET + 'servers: [{blocks: "0:4", identity: x}]': "servers[0].identity is set by scripts/swarm",
    POCKET + 'servers: [{blocks: "0:4", dtype: fp8}]': "servers[0]: dtype must be one of",
    POCKET + 'servers: [{blocks: "0:4", name: ../x}]': "servers[0]: name must be letters",
    POCKET + 'servers: [{blocks: "0:4", name: a}, {blocks: "0:4", name: a}]': "two servers have the name a",
    POCKET + 'servers: [{blocks: "0:4", port: 5}, {blocks: "0:4", port: 5}]': "two servers of one machine have the port 5",
    POCKET + 'servers: [{blocks: "0:2"}, {blocks: "2:5"}]': "servers[1]: blocks 2:5 reach outside the model, which has blocks 0:4",
    POCKET + 'servers: [{blocks: "0:4", host: gpu}]': "servers[0]: a server with a host needs a port",
    POCKET + 'servers: [{blocks: "0:4", host: "a b", port: 1}]': "servers[0]: host must be an IP address or a name",
    'model: /no/such\nservers: [{blocks: "0:4"}]': "servers[0]: model: no such directory: /no/such",
    POCKET + 'state: 3\nservers: [{blocks: "0:4"}]': "state must be a directory, got 3",
}


@pytest.mark.parametrize("text", SENTENCES)
def test_anything_wrong_is_one_sentence_that_names_the_file(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_plan(path)
    assert str(caught.value).startswith(str(path))
    assert SENTENCES[text] in str(caught.value)
    assert main(["up", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [found.name for found in tmp_path.iterdir()] == ["swarm.yaml"]


def test_commands_for_several_machines_fit_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
model: /models/my model
servers:
  - {blocks: "0:2", host: 192.0.2.7, port: 31337}
  - {blocks: "2:4", host: gpu-box.lan, port: 31337, transport: both}
  - {blocks: "2:4", host: gpu-box.lan, port: 31338, family: lab}
"""
    assert main(["up", "--print", str(written(tmp_path, text))]) == 0
    out, err = capsys.readouterr()
    assert "is not on this machine" in err
    shown = [block.splitlines() for block in out.strip().split("\n\n")]
    assert [block[0].split(",")[0] for block in shown] == ["# on 192.0.2.7", "# on gpu-box.lan", "# to train"]
    configs = [read_words(shlex.split(line)[2:]) for block in shown[:2] for line in block[1:]]
    assert [config.model for config in configs] == ["/models/my model"] * 3
    assert [(config.listen, config.port, config.announce) for config in configs] == [
        ("192.0.2.7", 31337, ()),
        ("0.0.0.0", 31337, ("/dns/gpu-box.lan/tcp/31337", "/dns/gpu-box.lan/udp/31337/quic-v1")),
        ("0.0.0.0", 31338, ("/dns/gpu-box.lan/tcp/31338",)),
    ]
    words = [word.replace("/models/my model", str(tmp_path)) for word in shlex.split(shown[2][1])[1:]]
    everyone = load_config(words).swarm.initial_peers
    assert len(everyone) == 4
    for number, config in enumerate(configs):
        peer_id = ensure_identity(tmp_path / "swarm.state" / str(config.identity)).peer_id
        assert config.identity == f"server-{number}.key"
        assert set(config.initial_peers) == {address for address in everyone if not address.endswith(peer_id)} != set(everyone)
    again = (main(["up", "--print", str(tmp_path / "swarm.yaml")]), capsys.readouterr().out)
    assert again == (0, out), "the keys, and so the addresses, stay"


def test_a_swarm_for_other_machines_is_not_started_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, POCKET + 'servers: [{blocks: "0:4", host: 192.0.2.7, port: 31337}]')
    assert main(["up", str(path)]) == 2
    assert "server-0 is for host 192.0.2.7: use up --print" in capsys.readouterr().err


def test_down_leaves_a_process_alone_that_got_the_number_of_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, POCKET + 'servers: [{blocks: "0:4"}]')
    (tmp_path / "swarm.state").mkdir()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
        try:
            record = tmp_path / "swarm.state" / "server-0.json"
            record.write_text(json.dumps({"port": 5, "pid": stranger.pid, "born": born_at(os.getpid()), "addresses": []}))
            assert main(["down", str(path)]) == 0
            assert capsys.readouterr().out == "no server of this plan runs\n"
            assert stranger.poll() is None
            assert json.loads(record.read_text()) == {"blocks": "0:4", "port": 5, "pid": 0, "born": "", "addresses": []}
            record.write_text(json.dumps({"port": 5, "pid": stranger.pid, "born": born_at(stranger.pid), "addresses": []}))
            assert main(["down", str(path)]) == 0
            assert stranger.wait(5) == -signal.SIGTERM, "with the right time of birth it would have been ours"
        finally:
            stranger.kill()


def test_servers_of_a_plan_that_has_changed_are_seen_refused_and_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, POCKET + 'servers: [{blocks: "0:4"}]')
    state = tmp_path / "swarm.state"
    state.mkdir()
    (state / "notes.json").write_text("[]")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as former:
        try:
            record = {"blocks": "2:4", "port": 5, "pid": former.pid, "born": born_at(former.pid), "addresses": []}
            (state / "tail.json").write_text(json.dumps(record))
            assert main(["status", str(path)]) == 1
            assert f"tail  blocks 2:4  process {former.pid}  no address yet  not ready yet (not in the plan)\n" in capsys.readouterr().out
            assert main(["up", str(path)]) == 2
            said = capsys.readouterr().err
            assert f"servers of another plan run in {state}: tail (process {former.pid}); scripts/swarm down first" in said
            assert said.count("\n") == 1
            assert main(["down", str(path)]) == 0
            assert capsys.readouterr().out == "tail stopped\n"
            assert former.wait(5) == -signal.SIGTERM
        finally:
            former.kill()
    assert not (state / "server-0.key").exists()


@pytest.mark.parametrize("what", ["up", "down"])
def test_a_second_command_does_not_work_with_a_state_directory_at_the_same_time(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, POCKET + 'servers: [{blocks: "0:4"}]')
    (tmp_path / "swarm.state").mkdir()
    with (tmp_path / "swarm.state" / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([what, str(path)]) == 2
    said = capsys.readouterr().err
    assert "another scripts/swarm works with" in said
    assert said.count("\n") == 1
    assert [found.name for found in (tmp_path / "swarm.state").iterdir()] == ["lock"]


@pytest.mark.parametrize("words", [["up"], ["up", "--print"]])
def test_a_state_directory_that_cannot_be_made_is_one_sentence(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, POCKET + 'servers: [{blocks: "0:4", port: 31337}]')
    (tmp_path / "file").touch()
    assert main([*words, str(path), "--state", str(tmp_path / "file" / "x")]) == 2
    said = capsys.readouterr().err
    assert "cannot be made" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"port": 1}', "null", '{"port": 1, "pid": "7", "born": "", "addresses": []}'])
def test_a_damaged_record_counts_as_no_process(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, POCKET + 'servers: [{blocks: "0:4"}]')
    (tmp_path / "swarm.state").mkdir()
    (tmp_path / "swarm.state" / "server-0.json").write_text(content)
    assert main(["status", str(path)]) == 1
    out, err = capsys.readouterr()
    assert "does not run" in out
    assert "server-0.json is damaged: server-0 counts as not running" in err
