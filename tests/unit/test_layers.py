"""The house keeps its floors: imports, read from the source by AST, never go up.

Goal: a module can be understood by reading what lies below it, and `import kvshare` costs nobody ray, vllm or torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 400

# A new module gets its line here. A name ending in "." stands for all modules below it.
LAYERS: dict[str, int] = {
    "kvshare.errors": 0,
    "kvshare.keys": 0,
    "kvshare.config": 1,
    "kvshare.messages": 1,
    "kvshare.cluster_messages": 1,
    "kvshare.places": 0,
    "kvshare.runs": 0,
    "kvshare.loading": 1,
    "kvshare.cards": 1,
    "kvshare.fingerprints": 1,
    "kvshare.index": 1,
    "kvshare.overlap": 1,
    "kvshare.routing": 1,
    "kvshare.index_reference": 1,
    "kvshare.cost": 1,
    "kvshare.hotness": 1,
    "kvshare.plan": 1,
    "kvshare.eviction": 1,
    "kvshare.placement": 1,
    "kvshare.gathering": 1,
    "kvshare.gate": 1,
    "kvshare.purge": 1,
    "kvshare.purge_rounds": 1,
    "kvshare.finding": 1,
    "kvshare.inventories": 1,
    "kvshare.leaving": 1,
    "kvshare.members": 1,
    "kvshare.planning": 1,
    "kvshare.answers": 1,
    "kvshare.outbox": 1,
    "kvshare.directory": 1,
    "kvshare.directory_events": 1,
    "kvshare.native": 2,
    "kvshare.mapping": 2,
    "kvshare.device": 2,
    "kvshare.disk": 2,
    "kvshare.disk_blocks": 2,
    "kvshare.disk_files": 2,
    "kvshare.disk_io": 2,
    "kvshare.processes": 2,
    "kvshare.region": 2,
    "kvshare.wire": 2,
    "kvshare.slots": 2,
    "kvshare.soiled": 2,
    "kvshare.store": 2,
    "kvshare.quota": 1,
    "kvshare.tenants": 1,
    "kvshare.vault": 2,
    "kvshare.segments": 1,
    "kvshare.bucket": 3,
    "kvshare.catalog": 3,
    "kvshare.upkeep": 3,
    "kvshare.objectstore": 3,
    "kvshare.transport": 3,
    "kvshare.transport.": 3,
    "kvshare.autostart": 4,
    "kvshare.blocking": 4,
    "kvshare.channel": 4,
    "kvshare.demotion": 4,
    "kvshare.directory_server": 4,
    "kvshare.disk_served": 4,
    "kvshare.disk_tier": 4,
    "kvshare.object_shelf": 4,
    "kvshare.leftovers": 4,
    "kvshare.exposed": 4,
    "kvshare.expiry": 4,
    "kvshare.handover": 4,
    "kvshare.link": 4,
    "kvshare.locating": 4,
    "kvshare.memory": 4,
    "kvshare.mover": 4,
    "kvshare.pull": 4,
    "kvshare.probe": 4,
    "kvshare.node": 4,
    "kvshare.onlooker": 4,
    "kvshare.node_session": 4,
    "kvshare.purging": 4,
    "kvshare.promotion": 4,
    "kvshare.question": 4,
    "kvshare.saving": 4,
    "kvshare.session": 4,
    "kvshare.shards": 4,
    "kvshare.tiers": 4,
    "kvshare.warm": 4,
    "kvshare.warm_group": 4,
    "kvshare.actors": 5,
    "kvshare.supervisor": 5,
    "kvshare.cli": 5,
    "kvshare.__main__": 5,
    "kvshare.integrations": 6,
    "kvshare.integrations.": 6,
}

# Heavy packages, each with the only modules that may import it.
ADAPTERS: dict[str, tuple[str, ...]] = {
    "ray": ("kvshare.actors", "kvshare.supervisor", "kvshare.integrations.ray", "kvshare.integrations.demo"),
    "vllm": ("kvshare.integrations.vllm", "kvshare.integrations.demo"),
    "torch": ("kvshare.integrations", "kvshare.transport.nccl"),
    "nixl": ("kvshare.transport.nixl",),
    "obstore": ("kvshare.bucket",),
    "cryptography": ("kvshare.vault",),
    "ucp": (),  # archived upstream; UCX is reached through NIXL (docs/decisions/0005)
}


@dataclass(frozen=True)
class Import:
    """``module`` imports ``target`` at ``line``. ``late``: within a function or under TYPE_CHECKING."""

    module: str
    target: str
    line: int
    late: bool

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}, imports {self.target}"


def sources() -> dict[str, Path]:
    """Every module of the package, by its import name."""
    found = {}
    for folder, package in (
        ("kvshare", "kvshare"),
        ("transport", "kvshare.transport"),
        ("integrations", "kvshare.integrations"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):  # does not follow the links kvshare/transport, kvshare/integrations
            if "__pycache__" in path.parts or path.relative_to(ROOT).parts[:2] in (
                ("kvshare", "transport"),
                ("kvshare", "integrations"),
            ):
                continue
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(tree: ast.AST, late: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, late
        else:
            yield from statements(
                node, late or is_type_checking(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            )


def imports(module: str, text: str, is_package: bool = False) -> Iterator[Import]:
    """Imports of ``text``; ``from kvshare import keys`` counts as ``kvshare.keys``."""
    for node, late in statements(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (Import(module, name.name, node.lineno, late) for name in node.names)
            continue
        base = node.module or ""
        if node.level:
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
            base = ".".join([*parents, *([base] if base else [])])
        for name in node.names:
            inner = f"{base}.{name.name}"
            yield Import(module, inner if inner in SOURCES else base, node.lineno, late)


def layer_of(module: str) -> int | None:
    if module in LAYERS:
        return LAYERS[module]
    families = [name for name in LAYERS if name.endswith(".") and module.startswith(name)]
    return LAYERS[max(families, key=len)] if families else None


def all_imports() -> list[Import]:
    return [
        found
        for module, path in SOURCES.items()
        for found in imports(module, path.read_text(), is_package=path.name == "__init__.py")
    ]


def violations(found: Import) -> list[str]:
    """What is wrong with one import, in a sentence each."""
    top = found.target.partition(".")[0]
    problems = []
    if top in ("transport", "integrations"):
        problems.append(f"{found}: say kvshare.{found.target}, the bare name would make second classes.")
    allowed = ADAPTERS.get(top)
    if allowed is not None and not any(found.module == name or found.module.startswith(f"{name}.") for name in allowed):
        problems.append(f"{found}: only {', '.join(allowed) or 'nobody'} may import {top}.")
    if top == "kvshare" and found.module != "kvshare":
        ours, theirs = layer_of(found.module), layer_of(found.target)
        if ours is not None and theirs is not None and theirs > ours:
            problems.append(f"{found}: layer {ours} must not import from layer {theirs}.")
    return problems


def test_every_module_has_a_layer() -> None:
    homeless = [module for module in SOURCES if module != "kvshare" and layer_of(module) is None]
    assert not homeless, f"add {', '.join(homeless)} to LAYERS in {Path(__file__).name}, as low as its imports allow"


def test_the_table_of_layers_names_no_module_that_is_gone() -> None:
    gone = [
        name for name in LAYERS if not any(module == name or module.startswith(f"{name.rstrip('.')}.") for module in SOURCES)
    ]
    assert not gone, f"take {', '.join(gone)} out of LAYERS in {Path(__file__).name}"


def test_no_module_imports_from_a_higher_layer_or_past_an_adapter() -> None:
    problems = [problem for found in all_imports() for problem in violations(found)]
    assert not problems, "\n".join(problems)


def test_importing_kvshare_itself_loads_only_the_two_lowest_layers() -> None:
    """Everything imports the package, so what it imports eagerly lies below everything."""
    eager = [
        found for found in all_imports() if found.module == "kvshare" and not found.late and found.target.startswith("kvshare.")
    ]
    too_high = [str(found) for found in eager if (layer_of(found.target) or 0) > 1]
    assert eager and not too_high, "\n".join(too_high)


def test_no_circle_of_imports_at_load_time() -> None:
    graph: dict[str, set[str]] = {module: set() for module in SOURCES}
    for found in all_imports():
        if not found.late and found.target in SOURCES:
            graph[found.module].add(found.target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "a circle of imports: " + " -> ".join([*path, module])
        if module not in done:
            for target in sorted(graph[module] - {"kvshare"}):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    ("module", "text", "sentence"),
    [
        ("kvshare.keys", "from kvshare import node", "layer 0 must not import from layer 4"),
        ("kvshare.store", "def f():\n    from kvshare.transport.base import Targets", "layer 2 must not import from layer 3"),
        ("kvshare.session", "import kvshare.integrations.api", "layer 4 must not import from layer 6"),
        ("kvshare.node", "import ray.util", "may import ray"),
        ("kvshare.mover", "if True:\n    import torch", "may import torch"),
        ("kvshare.integrations.ray.cluster", "from vllm import LLM", "may import vllm"),
        ("kvshare.integrations.api", "from transport.base import Targets", "say kvshare.transport.base"),
        ("kvshare.transport.shm", "from ..integrations import api", "layer 3 must not import from layer 6"),
    ],
)
def test_the_rule_catches(module: str, text: str, sentence: str) -> None:
    """The reader of imports itself can fail: each kind of violation is seen, however it is spelled."""
    problems = [problem for found in imports(module, text) for problem in violations(found)]
    assert len(problems) == 1 and sentence in problems[0]


def test_the_page_of_architecture_has_every_module_on_its_layer() -> None:
    """Modules within an integration's own folder are its affair; everything else has a line."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    lines = {name: int(layer) for layer, name in re.findall(r"^\| (\d) \| `(kvshare\.[a-z_.]+)` \|", page, re.MULTILINE)}
    wanted = {
        ".".join(module.split(".")[:3])
        for module in SOURCES
        if module not in ("kvshare", "kvshare.__main__", "kvshare.transport", "kvshare.integrations")
    }
    assert sorted(wanted - lines.keys()) == [], "these need a line in docs/architecture.md"
    assert sorted(lines.keys() - wanted) == [], "docs/architecture.md names these, which are gone"
    assert {name: layer_of(name) for name in lines} == lines


def test_functions_and_files_stay_short_enough_to_read() -> None:
    too_long = []
    for path in SOURCES.values():
        text = path.read_text()
        if (lines := text.count("\n")) > FILE_LINES_MAX:
            too_long.append(f"{path.relative_to(ROOT)} has {lines} lines, at most {FILE_LINES_MAX}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES_MAX:
                    too_long.append(
                        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines, at most {FUNCTION_LINES_MAX}"
                    )
    assert not too_long, "\n".join(too_long)
