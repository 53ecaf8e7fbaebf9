"""The import laws of the design, read from the source; and what ``import swarmtune`` does, seen in a fresh interpreter."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import swarmtune

ROOT = Path(__file__).parents[2]
PACKAGES = ("swarmtune", "servers", "recipes", "conf")
FILES = sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HYDRA_HOMES = ("swarmtune/config.py", "swarmtune/app.py", "swarmtune/cli.py", "recipes/", "servers/__main__.py")
LIGHTNING_HOMES = ("swarmtune/train/", "swarmtune/app.py", "recipes/")
HIVEMIND_HOMES = ("swarmtune/transport/hivemind.py", "swarmtune/discovery/")
HEAVY = (
    "torch",
    "hivemind",
    "lightning",
    "hydra",
    "omegaconf",
    "transformers",
    "peft",
    "datasets",
    "numpy",
    "wandb",
    "matplotlib",
    "rich",
    "cryptography",
    "msgpack",
)


def imports(path: str) -> Iterator[tuple[str, int]]:
    """Every module that a file imports at run time, in functions too; not what only type checkers see."""
    yield from _imports(ast.parse((ROOT / path).read_text(encoding="utf-8")), path)


def _imports(node: ast.AST, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.orelse:
            yield from _imports(child, path)
        return
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
        yield str(node.module), node.lineno
        yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        yield from ((str(argument.value), node.lineno) for argument in node.args[:1] if isinstance(argument, ast.Constant))
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, path)


def breaches(packages: tuple[str, ...], homes: tuple[str, ...], within: tuple[str, ...] = ("",)) -> list[str]:
    """Imports of ``packages`` outside of ``homes``, in files that begin with one of ``within``."""
    return [
        f"{path}:{line} imports {name}"
        for path in FILES
        if path.startswith(within) and not path.startswith(homes or ("/",))
        for name, line in imports(path)
        if name.split(".")[0] in packages
    ]


def test_the_laws_can_be_broken() -> None:
    assert breaches(("torch",), ())
    assert breaches(("hivemind",), ())
    assert breaches(("lightning",), ())
    assert breaches(("hydra", "omegaconf"), ())
    source = "if TYPE_CHECKING:\n    import a\nelse:\n    import b\ndef f():\n    from c.d import e\nimport_module('g')"
    assert [name for name, _ in _imports(ast.parse(source), "x")] == ["b", "c.d", "c.d.e", "g"]


def test_swarmtune_never_imports_servers() -> None:
    assert not breaches(("servers",), (), ("swarmtune/",))


def test_nobody_imports_recipes_by_name_and_recipes_import_no_servers() -> None:
    assert not breaches(("recipes",), ("recipes/",))
    assert not breaches(("servers",), (), ("recipes/",))


def test_hivemind_is_imported_behind_its_door_only() -> None:
    assert not breaches(("hivemind",), HIVEMIND_HOMES)


def test_hydra_is_imported_where_configuration_is_unpacked_only() -> None:
    assert not breaches(("hydra", "omegaconf"), HYDRA_HOMES)


def test_lightning_is_imported_by_the_training_half_only() -> None:
    assert not breaches(("lightning", "pytorch_lightning"), LIGHTNING_HOMES)


def test_wire_imports_torch_the_standard_library_types_and_errors_only() -> None:
    allowed = ("torch", "swarmtune.types", "swarmtune.errors", "swarmtune.wire")
    found = [
        f"{path}:{line} imports {name}"
        for path in FILES
        if path.startswith("swarmtune/wire/")
        for name, line in imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names and not name.startswith(allowed)
    ]
    assert not found


def test_a_config_never_enters_remote_wire_or_the_span() -> None:
    homes = ("swarmtune/remote/", "swarmtune/wire/", "servers/span.py")
    assert not [
        f"{path}:{line}"
        for path in FILES
        if path.startswith(homes)
        for name, line in imports(path)
        if name.startswith(("swarmtune.config", "swarmtune.schema"))
    ]


def test_nothing_imports_multiprocessing_pickle_or_concurrent_pools() -> None:
    assert not breaches(("multiprocessing", "pickle", "cloudpickle", "dill", "marshal", "shelve"), ())


@pytest.mark.parametrize("path", FILES)
def test_a_module_begins_with_a_docstring_and_starts_nothing(path: str) -> None:
    """No environment is read, no logging configured, no thread, loop or process started at import."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} has no docstring"
    forbidden = (
        "os.environ",
        "os.getenv",
        "logging.basicConfig",
        "threading.Thread",
        "asyncio.new_event_loop",
        "subprocess.",
        "set_start_method",
        "torch.set_",
        "warnings.filterwarnings",
    )
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
            continue
        if isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Call | ast.Subscript):
                assert not ast.unparse(node).startswith(forbidden), f"{path}:{node.lineno} does something at import"


@pytest.fixture(scope="module")
def fresh() -> dict[str, list[str]]:
    """What a fresh interpreter holds after ``import swarmtune``, beside what it held before."""
    code = (
        "import sys, os, threading, json; before = set(sys.modules); environ = dict(os.environ);"
        "import swarmtune, swarmtune.errors, swarmtune.types; after = sorted(set(sys.modules) - before);"
        "import logging; print(json.dumps({'modules': after, 'threads': [t.name for t in threading.enumerate()],"
        " 'handlers': [repr(h) for h in logging.getLogger().handlers], 'dir': dir(swarmtune),"
        " 'environ': [k for k in os.environ if environ.get(k) != os.environ[k]]}))"
    )
    out = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"], capture_output=True, text=True, timeout=60, check=True
    )
    assert out.stderr == ""
    found: dict[str, list[str]] = json.loads(out.stdout)
    return found


def test_importing_the_package_loads_nothing_heavy(fresh: dict[str, list[str]]) -> None:
    assert not [name for name in fresh["modules"] if name.split(".")[0] in HEAVY]
    assert {name.split(".")[0] for name in fresh["modules"]} <= {*sys.stdlib_module_names, "swarmtune"}
    assert len(fresh["modules"]) < 80


def test_importing_the_package_starts_and_changes_nothing(fresh: dict[str, list[str]]) -> None:
    assert fresh["threads"] == ["MainThread"]
    assert fresh["handlers"] == []
    assert fresh["environ"] == []


def test_every_public_name_resolves_and_is_listed(fresh: dict[str, list[str]]) -> None:
    assert fresh["dir"] == sorted(swarmtune.__all__)
    for name in swarmtune.__all__:
        value = getattr(swarmtune, name)
        assert name == "__version__" or value.__name__ == name
    assert {"BlockSpan", "Kwarg", "LocalSwarm", "Swarm", "connect", "load_causal_lm"} <= set(swarmtune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        swarmtune.nonsense  # noqa: B018
