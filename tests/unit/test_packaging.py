"""What is built from this tree holds everything, and nothing of it can be imported under a second name."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvshare

ROOT = Path(__file__).resolve().parents[2]
LINKS = ("transport", "integrations")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """A wheel of a copy of the sources, links kept, so that building leaves nothing in the tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    for folder in ("kvshare", *LINKS):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(out)], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


@pytest.mark.parametrize("link", LINKS)
def test_the_links_are_links_within_the_tree(link: str) -> None:
    assert (ROOT / "kvshare" / link).readlink() == Path("..") / link


def test_the_wheel_holds_every_module_of_the_tree(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    sources = [path for folder in ("kvshare", *LINKS) for path in (ROOT / folder).rglob("*.py")]
    for path in sources:
        name = path.relative_to(ROOT).as_posix()
        assert name in names or f"kvshare/{name}" in names, f"{name} is missing: has its folder an __init__.py?"


def test_the_wheel_holds_the_extension_its_source_its_types_and_the_license(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    sources = {
        path.relative_to(ROOT).as_posix() for pattern in ("*.c", "*.h", "*.pyi") for path in (ROOT / "kvshare").glob(pattern)
    }
    assert {"kvshare/py.typed", "kvshare/_native.c", *sources} <= set(names)
    assert [name for name in names if name.startswith("kvshare/_native.") and name.endswith(".so")]
    assert [name for name in names if name.endswith("/LICENSE")]


def test_the_wheel_installs_nothing_but_kvshare(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"kvshare"}


def test_the_wheel_registers_the_command_and_the_plugin(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    text = wheel.read(name).decode()
    assert "kvshare = kvshare.cli:main" in text
    assert "[vllm.general_plugins]\nkvshare = kvshare.integrations.vllm.plugin:register" in text


@pytest.mark.parametrize("name", LINKS)
def test_the_bare_name_cannot_be_imported_even_at_the_root_of_the_tree(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"ImportError: import kvshare.{name}, not {name}" in done.stderr


def test_importing_kvshare_loads_no_heavy_package_and_starts_nothing() -> None:
    script = (
        "import sys, threading, kvshare, kvshare.session, kvshare.node;"
        "print(sorted({'torch', 'ray', 'vllm', 'kvshare.integrations'} & set(sys.modules)), threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] 1"


def test_the_version_is_said_once() -> None:
    assert importlib.metadata.version("kvshare") == kvshare.__version__
