"""``docs/operations.md`` says what the code does: its keys are those of the schema, its commands, files and units parse.

``python -m tests.unit.test_operations_doc`` prints the table of keys, to be pasted when the keys change on purpose.
"""

from __future__ import annotations

import ast
import configparser
import dataclasses
import enum
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import servers.config
from servers.config import ServeConfig, read_words
from servers.private_swarm import argument_parser
from servers.swarm_plan import read_plan
from swarmtune.config import load_config

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
ADDRESS = "/ip4/127.0.0.1/tcp/31337/p2p/12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def commands(start: str) -> list[list[str]]:
    """The words of the commands that begin so, comments left out."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line.replace("ADDRESS", ADDRESS), comments=True) for line in lines if line.startswith(start)]


def key_table() -> str:
    """The table of keys, from the schema and its docstrings."""
    tree = ast.parse(Path(servers.config.__file__).read_text(encoding="utf-8"))
    (schema,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ServeConfig"]
    meanings = {
        field.target.id: ast.literal_eval(text.value)
        for field, text in zip(schema.body, schema.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }
    rows = []
    for field in dataclasses.fields(ServeConfig):
        if field.name != "parent_fd":
            rows.append(f"| `{field.name}` | {_shown(field.default)} | {meanings[field.name].replace('``', '`')} |\n")
    return "".join(rows)


def _shown(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "must be given"
    plain = default.value if isinstance(default, enum.Enum) else default
    return f"`{json.dumps(plain).strip(chr(34)) or json.dumps(plain)}`"


def test_the_keys_are_those_of_the_schema_with_its_words() -> None:
    found = re.search(r"\| key \| default \| meaning \|\n\|[-|]+\|\n((?:\|.*\n)*)", DOCUMENT)
    assert found is not None
    assert found[1] == key_table()


def test_the_yaml_of_a_server_has_every_key_and_its_default() -> None:
    values = yaml.safe_load((ROOT / "conf" / "server.yaml").read_text(encoding="utf-8"))
    assert list(values) == [field.name for field in dataclasses.fields(ServeConfig)]
    config = read_words(["model=x", "blocks=0:4"])
    assert config == ServeConfig("x", "0:4")


def test_every_serve_command_is_one_that_a_server_takes() -> None:
    found = commands("swarmtune serve")
    assert len(found) >= 2
    for words in found:
        assert read_words(words[2:]).port


def test_every_train_command_is_one_that_a_client_takes() -> None:
    (words,) = commands("swarmtune recipe=")
    assert load_config(words[1:]).swarm.initial_peers == (ADDRESS,)


def test_every_key_value_in_the_text_is_a_key() -> None:
    known = {field.name for field in dataclasses.fields(ServeConfig)}
    quoted = re.findall(r"`([a-z_]+)=([^`\s]*)`", DOCUMENT)
    assert len(quoted) > 10
    assert {key for key, _ in quoted} <= known
    for key, value in quoted:
        if value and value not in ("FILE",):
            read_words([word for word in ("model=x", "blocks=0:1") if not word.startswith(f"{key}=")] + [f"{key}={value}", "initial_peers=x"])


def test_every_private_swarm_in_it_is_a_plan(tmp_path: Path) -> None:
    files = blocks("yaml")
    assert len(files) == 2
    for text in files:
        (tmp_path / "swarm.yaml").write_text(text)
        plan = read_plan(tmp_path / "swarm.yaml", elsewhere="host:" in text)
        assert plan.state.name == "swarm.state"
        assert len(plan.members) >= 2
        assert all("not on this machine" in warning for warning in plan.warnings)


def test_every_scripts_swarm_command_parses() -> None:
    found = commands("scripts/swarm")
    assert {words[1] for words in found} == {"up", "status", "down"}
    for words in found:
        argument_parser().parse_args(words[1:])


def test_the_systemd_unit_has_known_keys_and_a_command_that_parses() -> None:
    (text,) = blocks("ini")
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    assert unit.sections() == ["Unit", "Service", "Install"]
    service = unit["Service"]
    words = shlex.split(service["ExecStart"])
    assert words[0].endswith("/swarmtune")
    assert words[1] == "serve"
    config = read_words(words[2:])
    assert config.identity is not None
    assert config.identity.startswith(f"/var/lib/{service['StateDirectory']}/")
    assert config.port
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > 30 + 5
    assert "%" not in text, "a % must be doubled in a unit"


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    (text,) = blocks("ini")
    path = tmp_path / "swarmtune.service"
    path.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", text, flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert [line for line in done.stderr.splitlines() if "swarmtune.service" in line] == []
    path.write_text(path.read_text().replace("KillMode=mixed", "KillMood=mixed"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert "KillMood" in done.stderr


def test_the_container_file_parses_copies_what_exists_and_starts_a_server() -> None:
    (text,) = blocks("dockerfile")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    assert {name for name, _ in steps} <= {"FROM", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    assert steps[0][0] == "FROM"
    copied = {source.rstrip("/") for name, rest in steps if name == "COPY" for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages | {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"} == copied
    found = dict(steps)
    assert json.loads(found["ENTRYPOINT"]) == ["swarmtune", "serve"]
    config = read_words(json.loads(found["CMD"]))
    assert found["EXPOSE"] == f"{config.port}/tcp"
    assert config.listen == "0.0.0.0"
    assert config.identity is not None
    assert config.identity.startswith(found["VOLUME"])
    for _, rest in (step for step in steps if step[0] == "RUN"):
        assert subprocess.run(["sh", "-n", "-c", rest], check=False).returncode == 0
    (run,) = commands("docker run")
    started = read_words(run[run.index("swarmtune") + 1 :])
    assert dataclasses.replace(started, announce=()) == config
    assert f"{config.port}:{config.port}" in run


def test_sentences_in_the_table_of_troubles_are_said_by_the_code() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for package in ("servers", "swarmtune") for path in (ROOT / package).rglob("*.py"))
    table = re.search(r"\| what is said \|.*?\n\|[-|]+\|\n((?:\|.*\n?)*)", DOCUMENT)
    assert table is not None
    rows = re.findall(r"^\| `(.*?)`", table[1], re.MULTILINE)
    assert len(rows) >= 8
    for row in rows:
        for part in re.split(r"\.\.\.|\(.*?\)|\bprocess N\b", row):
            assert part.strip() in sources, part


if __name__ == "__main__":
    print(key_table())
