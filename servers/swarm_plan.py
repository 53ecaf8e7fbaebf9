"""A private swarm as one YAML file says it: which servers, on which machines, with which keys."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servers.addresses import announced_addresses, listen_addresses
from servers.config import ServeConfig, read_words
from swarmtune.config import resolve_path
from swarmtune.conversion import nearest
from swarmtune.errors import UsageError
from swarmtune.model_files import count_blocks
from swarmtune.types import BlockSpan, gaps

OWN_KEYS = ("blocks", "port", "name", "announce", "host")
"""Keys that differ from server to server, so they stand below ``servers`` only."""
SET_HERE = ("identity", "parent_fd")
"""Keys that this tool sets."""
FILE_KEYS = ("servers", "state")
WILDCARDS = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Member:
    """One server of the plan.

    Attributes:
        name: of the server, and of its files in the state directory.
        host: the machine to run it on; ``None`` is this one.
        values: its keys for ``swarmtune serve``, without those that this tool sets.
        config: the same, checked.
    """

    name: str
    host: str | None
    values: Mapping[str, Any]
    config: ServeConfig

    def words(self, **more: Any) -> list[str]:
        """As ``key=value`` words for ``swarmtune serve``."""
        return [_word(key, value) for key, value in {**self.values, **more}.items()]

    def addresses(self, port: int, peer_id: str) -> list[str]:
        """Where the other servers and the clients find it."""
        config = self.config
        told = announced_addresses(config.announce, port, config.transport, peer_id)
        ip = config.listen if config.listen not in WILDCARDS else {"0.0.0.0": "127.0.0.1", "::": "::1"}[config.listen]
        return [f"{address}/p2p/{peer_id}" for address in told or listen_addresses(ip, port, config.transport)]


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole swarm.

    Attributes:
        state: the directory of keys, logs and process ids.
        warnings: sentences about what is allowed but hardly meant.
    """

    model: str
    state: Path
    members: tuple[Member, ...]
    warnings: tuple[str, ...]


def read_plan(path: str | Path, state: str | Path | None = None, *, elsewhere: bool = False) -> Plan:
    """Read and check a YAML file.

    Args:
        path: the file.
        state: another state directory than the one beside the file.
        elsewhere: the servers run on other machines, so paths are not looked for on this one.

    Raises:
        UsageError: anything wrong with it, in one sentence that names the file and the key.
    """
    file = Path(path)
    content = _read_yaml(file)
    try:
        members = _members(content, file.parent, elsewhere)
        warnings = _coverage(content, members, elsewhere)
    except (UsageError, ValueError) as error:
        raise UsageError(f"{file}: {error}") from error
    where = Path(state) if state is not None else file.parent / content.get("state", f"{file.stem}.state")
    return Plan(members[0].config.model, where.absolute(), members, warnings)


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is no YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} must hold keys such as model and servers")
    return content


def _members(content: Mapping[str, Any], folder: Path, elsewhere: bool) -> tuple[Member, ...]:
    known = [field.name for field in dataclasses.fields(ServeConfig) if field.name not in SET_HERE]
    _check_keys(content, [*FILE_KEYS, *(key for key in known if key not in OWN_KEYS)], "")
    if not isinstance(content.get("state", ""), str):
        raise UsageError(f"state must be a directory, got {content['state']!r}")
    servers = content.get("servers")
    if not isinstance(servers, list) or not servers:
        raise UsageError('servers must list at least one server, such as - {blocks: "0:4"}')
    shared = {key: value for key, value in content.items() if key not in FILE_KEYS}
    members = []
    for number, own in enumerate(servers):
        where = f"servers[{number}]"
        if not isinstance(own, dict):
            raise UsageError(f"{where} must be a group of keys, got {own!r}")
        _check_keys(own, [*known, "host"], f"{where}.")
        try:
            members.append(_member({"name": f"server-{number}", **shared, **own}, folder, elsewhere))
        except (UsageError, ValueError) as error:
            raise UsageError(f"{where}: {error}") from error
    names = [member.name for member in members]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two servers have the name {name}: names must differ")
    fixed = [(member.host, member.config.port) for member in members if member.config.port]
    for host, port in fixed:
        if fixed.count((host, port)) > 1:
            raise UsageError(f"two servers of one machine have the port {port}: ports must differ")
    return tuple(members)


def _member(values: dict[str, Any], folder: Path, elsewhere: bool) -> Member:
    host, name, model = values.pop("host", None), values["name"], values.get("model")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UsageError(f"name must be letters, digits, dots, dashes and underscores, because files are named after it, got {name!r}")
    if host is not None and (not isinstance(host, str) or not re.fullmatch(r"[A-Za-z0-9.:_-]{1,253}", host)):
        raise UsageError(f"host must be an IP address or a name, got {host!r}")
    if "blocks" in values:
        BlockSpan.parse(values["blocks"])  # here, where an unquoted 4:8 is still seen as the number that YAML makes of it
    if isinstance(model, str) and not elsewhere:
        values["model"] = resolve_path(str(folder / model) if (folder / model).is_dir() else model)
    if host is not None:
        values = _on_host(host, values)
    words = [_word(key, value) for key, value in values.items()]
    return Member(name, host, values, read_words(words))


def _on_host(host: str, values: dict[str, Any]) -> dict[str, Any]:
    """Listen where others reach that machine, unless something else is said."""
    if not values.get("port"):
        raise UsageError("a server with a host needs a port, because its address must be known before it starts")
    if "listen" in values:
        return values
    try:
        ipaddress.ip_address(host)
    except ValueError:
        tcp, quic = f"/dns/{host}/tcp/{values['port']}", f"/dns/{host}/udp/{values['port']}/quic-v1"
        told = {"quic": [quic], "both": [tcp, quic]}.get(values.get("transport", "tcp"), [tcp])
        return {"announce": told, **values, "listen": "0.0.0.0"}
    return {**values, "listen": host}


def _check_keys(given: Mapping[Any, Any], known: list[str], prefix: str) -> None:
    for key in given:
        if key in SET_HERE:
            raise UsageError(f"{prefix}{key} is set by scripts/swarm: leave it out")
        if key not in known:
            own = " (it stands below servers)" if key in OWN_KEYS else nearest(str(key), known)
            raise UsageError(f"there is no key {prefix}{key}{own}")


def _coverage(content: Mapping[str, Any], members: tuple[Member, ...], elsewhere: bool) -> tuple[str, ...]:
    """Blocks outside the model are an error, blocks that nobody holds a warning."""
    model = members[0].config.model
    if elsewhere and not Path(model).is_dir() and not model.startswith("pkg://"):
        return (f"{model} is not on this machine, so it is not checked whether the servers hold all of its blocks",)
    total = count_blocks(resolve_path(model))
    spans = [BlockSpan.parse(member.config.blocks) for member in members]
    for number, span in enumerate(spans):
        if span.stop > total:
            raise UsageError(f"servers[{number}]: blocks {span} reach outside the model, which has blocks 0:{total}")
    missing = gaps(spans, total)
    if missing and not content.get("initial_peers"):
        return (f"nobody holds blocks {', '.join(map(str, missing))} of 0:{total}: training must wait until others serve them",)
    return ()


def _word(key: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return f"{key}={'null' if value is None else str(value).lower()}"
    return f"{key}=[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else f"{key}={value}"
