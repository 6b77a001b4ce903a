"""The rooms and who may import whom (docs/architecture.md): imports point downward only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = ("tandem", "router", "prefill_worker", "decode_worker", "kv_transfer", "loadtest")
HEAVY = frozenset({"torch", "transformers", "ray", "numba", "safetensors"})
WEB = frozenset({"grpc", "grpc_health", "grpc_reflection", "http", "socketserver", "aiohttp", "fastapi", "requests"})

VALUES = frozenset(
    {"tandem.types", "tandem.errors", "tandem.config", "tandem.timeline", "tandem.prefix", "tandem.addresses"}
)
# Values and the wire: what every process shares.
SHARED = VALUES | {
    "tandem.hub",
    "tandem.model_files",
    "tandem.process",
    "tandem.rpc",
    "tandem.tokenizer",
    "tandem.wire",
    "tandem.v1",
}
WORKER = SHARED | {"tandem.engine", "tandem.worker", "kv_transfer"}


@dataclass(frozen=True)
class Room:
    # Other rooms it may import, besides itself.
    may: frozenset[str]
    # Packages of others that it must never import.
    never: frozenset[str] = frozenset()


EVERYTHING = frozenset(
    {*SHARED, *TOP, "tandem.engine", "tandem.worker", "tandem.client", "tandem.cli", "tandem.launch"}
)
ROOMS = {
    # The package itself: the version, and the SDK's names, which resolve on first use.
    "tandem": Room(VALUES | {"tandem.client"}, HEAVY),
    "tandem.types": Room(VALUES, HEAVY | WEB),
    "tandem.errors": Room(frozenset(), HEAVY | WEB),
    "tandem.addresses": Room(VALUES, HEAVY | WEB),
    "tandem.timeline": Room(frozenset(), HEAVY | WEB),
    "tandem.prefix": Room(frozenset(), HEAVY | WEB),
    "tandem.config": Room(VALUES, HEAVY | WEB),
    "tandem.process": Room(frozenset(), HEAVY | WEB),
    "tandem.hub": Room(VALUES, HEAVY | WEB),
    "tandem.model_files": Room(VALUES, HEAVY | WEB),
    "tandem.tokenizer": Room(VALUES | {"tandem.hub", "tandem.model_files"}, HEAVY - {"transformers"} | WEB),
    "tandem.out_of_memory": Room(frozenset(), HEAVY - {"torch"} | WEB),
    "tandem.rpc": Room(SHARED, HEAVY),
    "tandem.wire": Room(SHARED, HEAVY),
    "tandem.v1": Room(frozenset(), HEAVY),
    "tandem.client": Room(SHARED, HEAVY),
    "tandem.engine": Room(
        VALUES | {"tandem.hub", "tandem.model_files", "tandem.out_of_memory", "tandem.tokenizer"}, WEB | {"ray"}
    ),
    "tandem.worker": Room(SHARED | {"tandem", "tandem.engine", "kv_transfer"}, frozenset({"ray"})),
    "tandem.cli": Room(EVERYTHING),
    "tandem.launch": Room(EVERYTHING),
    "router": Room(SHARED | {"tandem", "router.doors", "router.life", "router.pool"}, HEAVY - {"transformers"}),
    "router.doors": Room(SHARED | {"tandem", "router", "router.life", "router.pool"}, HEAVY - {"transformers"}),
    "router.life": Room(SHARED | {"router", "router.pool", "router.policy"}, HEAVY),
    "router.pool": Room(SHARED | {"tandem", "router", "router.policy"}, HEAVY),
    "router.policy": Room(VALUES, HEAVY | WEB),
    "prefill_worker": Room(WORKER, frozenset({"ray"})),
    "decode_worker": Room(WORKER, frozenset({"ray"})),
    "kv_transfer": Room(SHARED | {"tandem.out_of_memory"}, frozenset({"transformers"})),
    "loadtest": Room(VALUES | {"tandem", "tandem.client"}, HEAVY),
}
# The only modules that know Ray: everything else runs without it.
KNOW_RAY = frozenset(
    map(Path, ("kv_transfer/carriers/ray/plasma.py", "tandem/launch/ray/cluster.py", "tandem/launch/ray/member.py"))
)
# Whatever reads these runs code that a peer wrote.
UNPICKLERS = frozenset({"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle"})
MAX_LINES = 350


@dataclass(frozen=True)
class Import:
    module: str
    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def room_of(module: str) -> str | None:
    """The room that a module of ours belongs to; None for somebody else's."""
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in ROOMS), None)


def imports_of(source: str, path: Path) -> Iterator[Import]:
    """Every import, wherever it stands: inside functions and under TYPE_CHECKING too."""
    package = path.with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, path, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            module = base if node.level else node.module or ""
            yield from (Import(f"{module}.{alias.name}", path, node.lineno) for alias in node.names)


def violations(source: str, path: Path) -> list[str]:
    """What a file of one room imports that it may not."""
    here = room_of(".".join(path.with_suffix("").parts))
    assert here is not None, path
    rules, found = ROOMS[here], []
    for each in imports_of(source, path):
        there = room_of(each.module)
        outsider = there is None and each.module.split(".")[0] in rules.never
        intruder = there is not None and there != here and there not in rules.may
        if outsider or intruder:
            found.append(f"{each}: {here} may not")
    return found


def files(*tops: str) -> list[Path]:
    """Our Python files, relative to the root; generated stubs are not ours to judge."""
    found = [path.relative_to(ROOT) for top in tops for path in (ROOT / top).rglob("*.py")]
    return [path for path in sorted(found) if path.parts[:2] != ("tandem", "v1")]


def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_imports_point_downward_only() -> None:
    broken = [problem for path in files(*TOP) for problem in violations(read(path), path)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("router/app.py", "import torch"),
        ("router/app.py", "def f():\n    from kv_transfer.frames.codec import encode"),
        ("router/app.py", "from tandem.engine.engine import Engine"),
        ("router/app.py", "from tandem import engine"),
        ("router/pool/worker.py", "from router.life.inbox import Inbox"),
        ("prefill_worker/service.py", "from decode_worker import service"),
        ("decode_worker/service.py", "import router.app"),
        ("kv_transfer/frames/codec.py", "import tandem.engine.batch"),
        ("tandem/engine/engine.py", "import grpc.aio"),
        ("tandem/engine/engine.py", "from tandem import rpc"),
        ("tandem/engine/engine.py", "if TYPE_CHECKING:\n    from kv_transfer.frames.codec import Frame"),
        ("tandem/worker/host.py", "import prefill_worker"),
        ("tandem/client/aio.py", "from torch import nn"),
        ("tandem/client/aio.py", "from tandem.launch import processes"),
        ("tandem/types.py", "import grpc"),
        ("tandem/client/aio.py", "from ..engine import engine"),
        ("loadtest/runner.py", "from router.app import run"),
    ],
)
def test_a_forbidden_import_is_seen(path: str, source: str) -> None:
    assert violations(source, Path(path)), f"{path} was allowed to say: {source}"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("router/app.py", "from tandem import errors, rpc, wire\nimport grpc"),
        ("prefill_worker/service.py", "import kv_transfer.ends.sender, torch\nfrom tandem.worker.host import Host"),
        ("tandem/engine/engine.py", "import torch, transformers\nfrom tandem.engine.batch import StepBatch"),
        ("tandem/client/aio.py", "from . import request\nfrom ..types import Event"),
        ("tandem/cli/main.py", "import router, torch"),
        ("loadtest/runner.py", "from tandem.client import AsyncClient"),
    ],
)
def test_an_allowed_import_is_not(path: str, source: str) -> None:
    assert violations(source, Path(path)) == []


def test_few_modules_know_ray() -> None:
    imports = [each for path in files(*TOP) for each in imports_of(read(path), path)]
    assert {each.path for each in imports if each.module.split(".")[0] == "ray"} <= KNOW_RAY


def test_nothing_can_unpickle() -> None:
    """Tests may: they make the payloads that must bounce."""
    shipped = files(*TOP, "scripts", "benchmarks")
    imports = [each for path in shipped for each in imports_of(read(path), path)]
    assert [str(each) for each in imports if each.module.split(".")[0] in UNPICKLERS] == []


def test_logging_is_configured_in_entry_points_only() -> None:
    def is_entry_point(path: Path) -> bool:
        mains = {Path("router/app.py"), Path("tandem/worker/main.py"), Path("tandem/launch/ray/member.py")}
        return path.name == "__main__.py" or path.parts[:2] == ("tandem", "cli") or path in mains

    def configures(path: Path) -> bool:
        return any(call in read(path) for call in ("logging.basicConfig(", "logs.configure("))

    # tandem/process/logs.py is what they call.
    callers = [path for path in files(*TOP) if not is_entry_point(path) and configures(path)]
    assert callers == [Path("tandem/process/logs.py")]


def test_processes_that_serve_wait_for_no_output() -> None:
    """Each begins with it: a library that it imports may print. `tandem.launch.child` is the start of every child."""
    mains = [f"{room}/__main__.py" for room in ("router", "prefill_worker", "decode_worker")]
    commands = [f"tandem/cli/{command}.py" for command in ("serve", "worker", "demo")]
    calls = "    never_block()\n"
    assert [path for path in (*mains, *commands, "tandem/launch/child.py") if calls not in read(Path(path))] == []


def test_files_stay_readable() -> None:
    long = {str(path): lines for path in files(*TOP) if (lines := len(read(path).splitlines())) > MAX_LINES}
    assert long == {}


def test_folders_do_not_shadow_packages() -> None:
    """An __init__.py in proto/ would claim its path; in tests/router it would hide the router."""
    assert not (ROOT / "proto" / "__init__.py").exists()
    assert [str(path) for path in (ROOT / "tests").rglob("__init__.py")] == []


def test_no_two_tests_share_a_file_name() -> None:
    """Without packages pytest knows a file by its name alone, and collects only one of two."""
    counts = Counter(path.name for path in files("tests") if path.name != "conftest.py")
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("module", ["tandem", "tandem.client", "tandem.types", "tandem.config", "router.app"])
def test_importing_it_pulls_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({set(HEAVY)!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_cli_starts_without_torch_and_what_load_tests_need() -> None:
    unwanted = {*HEAVY, "aiohttp", "numpy"}
    code = f"import sys, tandem.cli.app; print(sorted({unwanted!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "[]"
