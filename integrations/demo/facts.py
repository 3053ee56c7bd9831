"""What a figure must name to mean anything: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


def gpus() -> int:
    """NVIDIA GPUs of this machine, without importing torch."""
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def cores() -> list[int]:
    """Processors that we may use."""
    return sorted(os.sched_getaffinity(0))


def machine(device: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """This machine, the engines' ``device`` and the ``versions`` they tell."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": len(cores()),
        "memory_gib": round(memory / 2**30, 1),
        "device": device,
        "gpus": gpus(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "ray": version("ray"),
        **versions,
    }


def commit() -> str:
    """Commit of the checkout that we run from, marked when it has changes; empty outside one."""
    folder = Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # named by its architecture then
    return platform.machine()
