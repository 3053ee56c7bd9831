"""Which transport a read goes by."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvshare.config import Settings
from kvshare.slots import Arena, Region
from kvshare.transport.base import BlockStatus
from kvshare.transport.choose import Transports, host_id

from .conftest import HOST, SECRET, SLOT_BYTES, Landing, request_for, write

Make = Callable[..., Settings]


@pytest.fixture
def arena(short_dir: Path) -> Arena:
    made = Arena.open(str(short_dir / "arena"), SLOT_BYTES, SLOT_BYTES, SLOT_BYTES)
    assert made.available_slots or made.grow()
    return made


def read(transports: Transports, region: Region, host: str, endpoint: str) -> list[int]:
    block = write(region, 0, np.full(SLOT_BYTES, 7, np.uint8), seed=3)
    landing = Landing(1, [SLOT_BYTES])
    completion = transports.read(region.describe("a", host, endpoint), request_for([block], landing.targets)).wait()
    assert completion is not None
    statuses: list[int] = completion.statuses.tolist()
    return statuses


def test_a_neighbour_is_read_by_its_files_and_others_by_tcp(make_settings: Make, arena: Arena) -> None:
    node, session = Transports(make_settings(secret=SECRET), HOST, serve=True), Transports(make_settings(secret=SECRET), HOST)
    elsewhere = Transports(make_settings(secret=SECRET), "another host")
    node.register(arena)
    assert session.endpoint() == ""
    host, _, port = node.endpoint().rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0
    assert read(session, arena, HOST, "127.0.0.1:1") == [BlockStatus.OK], "nothing listens on port 1: it went by the files"
    arena.close(unlink=True)
    assert read(elsewhere, arena, HOST, node.endpoint()) == [BlockStatus.OK], "no files any more: it went by tcp"
    node.deregister(arena)
    elsewhere.forget("a")
    for transports in (node, session, elsewhere):
        transports.close()
        transports.close()


def test_without_a_secret_or_a_common_host_nothing_is_reached(make_settings: Make, arena: Arena) -> None:
    transports = Transports(make_settings(), "another host", serve=True)
    assert transports.endpoint() == ""
    assert not transports.reaches(arena.describe("a", HOST, "127.0.0.1:1"))
    assert read(transports, arena, HOST, "127.0.0.1:1") == [BlockStatus.UNREACHABLE]
    transports.close()
    arena.close(unlink=True)


def test_the_setting_names_what_is_enabled_in_order_of_preference(make_settings: Make, arena: Arena) -> None:
    only_tcp = Transports(make_settings(secret=SECRET, transports="tcp"), HOST, serve=True)
    assert read(only_tcp, arena, HOST, only_tcp.endpoint()) == [BlockStatus.UNREACHABLE], "not registered with it"
    only_tcp.register(arena)
    assert read(only_tcp, arena, HOST, only_tcp.endpoint()) == [BlockStatus.OK]
    only_tcp.close()
    arena.close(unlink=True)


def test_processes_of_one_host_and_user_have_one_host_id() -> None:
    command = [sys.executable, "-c", "from kvshare.transport.choose import host_id; print(host_id())"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == host_id()
