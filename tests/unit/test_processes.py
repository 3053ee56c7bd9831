"""Names of processes that are never used again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvshare import processes


def test_a_process_keeps_its_start_and_another_has_another() -> None:
    mine = processes.started(os.getpid())
    assert mine == processes.started(os.getpid())
    with subprocess.Popen(["sleep", "60"]) as child:
        its = processes.started(child.pid)
        child.kill()
    assert its > mine


def test_the_start_is_found_behind_any_command_name() -> None:
    name, before = Path("/proc/self/comm"), Path("/proc/self/comm").read_text()
    mine = processes.started(os.getpid())
    name.write_text(") S 1 2 (3)")
    try:
        assert processes.started(os.getpid()) == mine
    finally:
        name.write_text(before)


def test_a_process_that_is_not_there_has_no_start() -> None:
    with pytest.raises(OSError):
        processes.started(int(Path("/proc/sys/kernel/pid_max").read_text()))


def test_a_child_has_the_same_boot_and_pid_space_and_sees_our_start() -> None:
    script = (
        "import os; from kvshare import processes as p; print(p.boot_id(), p.pid_space(), p.started(os.getppid()), sep='\\n')"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert told == [processes.boot_id(), processes.pid_space(), str(processes.started(os.getpid()))]


def test_where_the_boot_is_hidden_no_other_process_has_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "BOOT_ID", tmp_path / "nothing")
    assert str(os.getpid()) in processes.boot_id()
    assert str(os.getpid()) in processes.pid_space()


def test_allowing_reading_harms_nothing_where_there_is_nothing_to_allow() -> None:
    processes.allow_reading()
    assert processes.started(os.getpid()) > 0
