"""What the README shows a reader works as shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvshare.config import MIB, Settings
from kvshare.node import Node

ROOT = Path(__file__).resolve().parents[2]


def snippet(marker: str) -> str:
    """The one Python block of the README that contains ``marker``."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if marker in block]
    return str(found)


@pytest.fixture
def node(make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """A node at the place that the snippet's settings will name."""
    settings = make_settings(arena_bytes=256 * MIB, arena_chunk_bytes=64 * MIB)
    for name in ("runtime_dir", "shm_dir", "arena_bytes", "arena_chunk_bytes"):
        monkeypatch.setenv(f"KVSHARE_{name.upper()}", str(getattr(settings, name)))
    node = Node(settings)
    node.start()
    yield node
    node.stop()


def test_a_custom_stack_computes_once_and_loads_what_it_saved_afterwards(node: Node) -> None:
    computed: list[int] = []

    def prefill(tokens: list[int], blocks: Any, start: int) -> None:
        computed.append(len(tokens) - start)
        for block in range(start // 16, len(blocks)):
            blocks[block] = block

    code = compile(snippet("kvshare.connect"), "README.md", "exec")
    names: dict[str, Any] = {"prefill": prefill}
    exec(code, names)
    exec(code, names)
    assert computed == [1024, 0]
    assert [int(row[0]) for row in names["blocks"]] == list(range(64))


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    dead = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not dead
