"""The arrows of the design: who may import whom, who may print, who may read the environment.

Imports are read from the syntax tree, wherever they stand in a file; those under TYPE_CHECKING do
not count, because they do not run. Each rule is also given a planted violation that it must report.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Parts of localspec, lowest first. A part may import itself and lower layers. Parts of one layer do
# not know each other, except in the top layer.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"types", "errors"}),
    frozenset({"tree", "noise", "replay", "formats"}),
    frozenset({"protocols", "ranking"}),
    frozenset({"preparation", "context", "sampling", "host_scores", "fingerprint", "peers"}),
    frozenset({"memory", "compatibility", "constraint", "exactness", "history"}),
    frozenset({"verify", "drafters", "schedule"}),
    frozenset({"engine", "copies"}),
    frozenset({"pair"}),
    frozenset({"loading"}),
    frozenset({"server", "bench", "audit", "tune", "hub", "doctor", "terminal", "commands", "highlight", "trace"}),
)
RANKS = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
TOP = len(LAYERS) - 1

# `localspec/__init__.py` is the public face and `testing` serves every layer: they may import anything
# below the top. From the first only the version is imported, from the second only by the top layer
# (a benchmark of the core alone needs a model that costs nothing).
OUTSIDE_LAYERS = frozenset({"", "testing"})

# What a backend implements, and the pieces it may build that from.
FOR_BACKENDS = frozenset(
    {
        "types",
        "errors",
        "protocols",
        "preparation",
        "noise",
        "sampling",
        "host_scores",
        "context",
        "tree",
        "replay",
        "formats",
        "peers",
    }
)

RUNTIMES = frozenset({"mlx", "mlx_lm", "llama_cpp", "torch", "transformers", "backends", "cli"})
OTHER_RUNTIMES = {
    "llamacpp": frozenset({"mlx", "mlx_lm", "torch", "transformers"}),
    "mlx": frozenset({"llama_cpp", "torch"}),
}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module. at_load: importing the file runs it."""

    module: str
    line: int
    at_load: bool

    @property
    def root(self) -> str:
        return self.module.split(".")[0]

    @property
    def part(self) -> str:
        """The part of localspec that is meant: `engine` of `localspec.engine.round`."""
        return [*self.module.split("."), ""][1]


def imports_of(source: str, package: str) -> list[Import]:
    """All imports of a file that can run. package: the dotted name that a relative import starts from."""
    found: list[Import] = []

    def visit(node: ast.AST, at_load: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            if base in ("localspec", "backends", package):  # `from localspec import engine` names parts
                found.extend(Import(f"{base}.{alias.name}", node.lineno, at_load) for alias in node.names)
            else:
                found.append(Import(base, node.lineno, at_load))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.orelse:
                visit(statement, at_load)
        else:
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                names = [argument for argument in node.args[:1] if isinstance(argument, ast.Constant)]
                found.extend(Import(str(name.value), node.lineno, at_load) for name in names)
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                visit(child, at_load and not inside)

    visit(ast.parse(source), True)
    return found


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parents, node.module] if node.module else parents)


def core_violations(path: str, source: str) -> list[str]:
    """What is wrong with the imports of a file of localspec; path relative to the repository."""
    parts = Path(path).with_suffix("").parts
    source_part = parts[1] if parts[1] != "__init__" else ""
    package = ".".join(parts[:-1])
    problems = []
    if source_part not in OUTSIDE_LAYERS and source_part not in RANKS:
        problems.append(f"{path}: {source_part!r} has no layer; give it one in LAYERS")
    for entry in imports_of(source, package):
        if entry.root in RUNTIMES:
            problems.append(f"{path}:{entry.line}: the core imports {entry.module}")
        elif entry.root == "localspec" and not _core_may_import(source_part, entry.part):
            problems.append(f"{path}:{entry.line}: {source_part or 'localspec'} imports {entry.module}")
    return problems


def _core_may_import(source: str, target: str) -> bool:
    if source == target or target == "__version__":
        return True
    if target == "testing":
        return RANKS.get(source) == TOP
    if target not in RANKS and source not in OUTSIDE_LAYERS:
        return False
    if source in OUTSIDE_LAYERS:
        return target not in RANKS or RANKS[target] < TOP
    same_layer = RANKS.get(source, -1) == RANKS[target]
    return RANKS.get(source, -1) > RANKS[target] or (same_layer and RANKS[target] == TOP)


def backend_violations(path: str, source: str) -> list[str]:
    """What is wrong with the imports of a file of a backend."""
    parts = Path(path).with_suffix("").parts
    own = parts[1]
    problems = []
    for entry in imports_of(source, ".".join(parts[:-1])):
        if entry.root == "localspec" and entry.part not in FOR_BACKENDS:
            problems.append(f"{path}:{entry.line}: a backend imports {entry.module}")
        if entry.root == "cli" or (entry.root == "backends" and entry.part != own):
            problems.append(f"{path}:{entry.line}: a backend imports {entry.module}")
        if entry.root in OTHER_RUNTIMES.get(own, frozenset()):
            problems.append(f"{path}:{entry.line}: {own} imports {entry.module}")
    absolute = re.finditer(r"^\s*(from|import) backends\b.*", source, re.MULTILINE)
    reason = "is not relative; another `backends` may come first on the path"
    return problems + [f"{path}: {line[0].strip()!r} {reason}" for line in absolute]


def cli_violations(source: str, path: str = "cli.py") -> list[str]:
    """What the command line imports when it is loaded, besides its own parts, click and the standard library."""
    allowed = sys.stdlib_module_names | {"click"}
    return [
        f"{path}:{entry.line}: imports {entry.module} at top level"
        for entry in imports_of(source, "")
        if entry.at_load and entry.root not in allowed and not entry.module.startswith("localspec.commands")
    ]


def call_lines(source: str, *names: str) -> list[int]:
    """Lines on which a function of one of these plain names is called."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]


def environment_lines(source: str) -> list[int]:
    """Lines that reach for the environment through `os`, however it was imported."""
    names = {"environ", "environb", "getenv", "putenv"}
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            lines.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names}:
            lines.append(node.lineno)
    return lines


def files_under(*folders: str) -> Iterator[tuple[str, str]]:
    """(path relative to the repository, source) of every Python file."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


# ---------------------------------------------------------------- the tree as it is


def test_the_core_imports_downwards_and_no_runtime() -> None:
    problems = [problem for path, source in files_under("localspec") for problem in core_violations(path, source)]
    assert not problems, "\n".join(problems)


def test_backends_know_the_contract_only() -> None:
    problems = [problem for path, source in files_under("backends") for problem in backend_violations(path, source)]
    assert not problems, "\n".join(problems)


def test_cli_imports_click_only_when_loaded() -> None:
    problems = cli_violations((ROOT / "cli.py").read_text(encoding="utf-8"))
    for path, source in files_under("localspec/commands"):
        problems += cli_violations(source, path)
    assert not problems, "\n".join(problems)


def test_only_the_command_line_prints() -> None:
    printing = [
        f"{path}:{line}"
        for path, source in files_under("localspec", "backends")
        for line in call_lines(source, "print")
    ]
    assert not printing


def test_the_core_asks_capabilities_not_attributes() -> None:
    asking = [f"{path}:{line}" for path, source in files_under("localspec") for line in call_lines(source, "hasattr")]
    assert not asking


def test_the_environment_is_read_in_cli_only() -> None:
    """llama.cpp's OpenMP waiting policy can be set in no other way: one file of its backend may."""
    reading = [path for path, source in files_under("localspec", "backends") if environment_lines(source)]
    elsewhere = [path for path in reading if not path.startswith("backends/llamacpp/")]
    assert not elsewhere
    assert len(reading) <= 1, reading


def test_help_loads_neither_numpy_nor_the_core() -> None:
    loaded = _modules_loaded_by("-X", "importtime", "cli.py", "--help")
    heavy = {"numpy", "backends", "jinja2", "rich", "prompt_toolkit", "mlx", "llama_cpp"} & _roots(loaded)
    assert not heavy
    assert "click" in loaded, "the list of imports could not be read"
    own = {name for name in loaded if name.startswith("localspec.") and not name.startswith("localspec.commands")}
    assert not own


@pytest.mark.parametrize("name", ["llamacpp", "mlx"])
def test_importing_a_backend_does_not_import_its_runtime(name: str) -> None:
    loaded = _roots(_modules_loaded_by("-X", "importtime", "-c", f"import backends.{name}"))
    assert not {"mlx", "mlx_lm", "llama_cpp", "transformers"} & loaded
    assert "backends" in loaded, "the list of imports could not be read"


def _modules_loaded_by(*arguments: str) -> set[str]:
    """Names of what a Python process imports, from `-X importtime`."""
    process = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return {line.rsplit("|", 1)[1].strip() for line in process.stderr.splitlines() if "|" in line}


def _roots(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


# ---------------------------------------------------------------- the checkers, on planted faults


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("localspec/engine/round.py", "import mlx.core as mx"),
        ("localspec/engine/round.py", "def f():\n    from llama_cpp import llama_decode"),
        ("localspec/loading.py", "import backends.mlx"),
        ("localspec/loading.py", "from importlib import import_module\nimport_module('mlx.core')"),
        ("localspec/verify/walk.py", "from localspec.engine.round import run"),
        ("localspec/verify/walk.py", "from localspec import engine"),
        ("localspec/verify/walk.py", "from ..engine import round"),
        ("localspec/verify/walk.py", "from localspec.drafters.ngram import Ngram"),
        ("localspec/errors.py", "from localspec.protocols import Step"),
        ("localspec/engine/round.py", "from localspec.testing.reference import ReferenceModel"),
        ("localspec/engine/round.py", "if x:\n    from localspec.server import app"),
        ("localspec/novelty.py", "x = 1"),
    ],
)
def test_a_planted_arrow_in_the_core_is_reported(path: str, source: str) -> None:
    assert len(core_violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("localspec/engine/round.py", "from localspec.verify import Walk\nimport numpy as np"),
        ("localspec/engine/round.py", "from .width import pad"),
        ("localspec/protocols.py", "if TYPE_CHECKING:\n    from localspec.sampling import Law"),
        ("localspec/audit/report.py", "from localspec.bench.workloads import read"),
    ],
)
def test_an_allowed_arrow_is_not_reported(path: str, source: str) -> None:
    assert not core_violations(path, source)


@pytest.mark.parametrize(
    "source",
    [
        "from localspec.engine import session",
        "def f():\n    import localspec.drafters.ngram",
        "from ..llamacpp import native",
        "import llama_cpp",
        "import cli",
    ],
)
def test_a_planted_arrow_in_a_backend_is_reported(source: str) -> None:
    assert len(backend_violations("backends/mlx/model.py", source)) == 1


def test_an_absolute_import_of_a_backend_is_reported() -> None:
    assert backend_violations("backends/mlx/model.py", "from backends.mlx.cache import TreeCache")
    assert not backend_violations("backends/mlx/model.py", "from .cache import TreeCache\nimport mlx.core as mx")


def test_a_planted_import_in_cli_is_reported() -> None:
    assert cli_violations("import click\nimport numpy")
    assert cli_violations("from localspec.engine import session")
    assert not cli_violations("import json\nimport click\ndef f():\n    import numpy")


def test_planted_calls_are_reported() -> None:
    assert call_lines("x = 1\nprint(x)", "print") == [2]
    for source in ("import os\nos.environ['A']", "import os\nos.getenv('A')", "x = 1\nfrom os import environ"):
        assert environment_lines(textwrap.dedent(source)) == [2]
