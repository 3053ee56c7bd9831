"""What every test gets: no settings from the developer's environment, a place of its own for sockets and arenas."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from kvshare.config import PREFIX, Settings

# Times vary on shared machines, so no deadlines; a failure prints what reproduces it.
hypothesis.settings.register_profile("kvshare", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("kvshare")


def pytest_configure() -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """An empty folder with a short name: a Unix socket's path holds 103 bytes, pytest's own folders may not fit."""
    folder = Path(tempfile.mkdtemp(prefix="kvs-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def make_settings(short_dir: Path) -> Callable[..., Settings]:
    """Settings whose sockets and arenas lie in `short_dir`, small, with nothing started by itself."""

    def make(**overrides: Any) -> Settings:
        small = {"arena_bytes": 8 << 20, "arena_chunk_bytes": 1 << 20, "autostart": False}
        places = {"runtime_dir": str(short_dir), "shm_dir": str(short_dir)}
        return Settings.load({**places, **small, **overrides}, {})

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip with the reason where there is none; torch is asked only if one was collected."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
