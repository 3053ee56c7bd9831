"""Real nodes, directories and sessions on this machine, each test in folders of its own."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import kvshare
from kvshare import Settings
from kvshare.directory_server import DirectoryServer
from kvshare.keys import Namespace
from kvshare.node import Node

SECRET = "a secret of the tests"
BLOCK_BYTES = 8192
BLOCK_SIZE = 4
SPACE = Namespace(
    weights="blake2b:1", dtype="bf16", kv_dtype="bf16", block_size=BLOCK_SIZE, page_bytes=4096, layers=2, kv_heads=1,
    head_size=64, hash_algorithm="kvshare-chain", hash_seed="", packing="test", label="test model",
)  # fmt: skip


def eventually(question: Callable[[], object], seconds: float = 10.0) -> bool:
    """True as soon as ``question()`` is; False when it is not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if question():
            return True
        time.sleep(0.01)
    return False


def blocks_of(tokens: list[int], seed: int = 0) -> np.ndarray:
    """One row of seeded random bytes per full block: equal tokens and seed, equal bytes."""
    count = len(tokens) // BLOCK_SIZE
    generator = np.random.default_rng([seed, len(tokens), *tokens[:4]])
    return generator.integers(0, 255, (count, BLOCK_BYTES), np.uint8)


class Host:
    """A pretended host: its own socket and arena. Its node runs in this process, or in one that can be killed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.node: Node | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Host:
        self.node = Node(self.settings)
        self.node.start()
        return self

    def environment(self) -> dict[str, str]:
        """Ours, with this host's settings."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KVSHARE_")}
        for name, value in dataclasses.asdict(self.settings).items():
            environment[f"KVSHARE_{name.upper()}"] = ",".join(value) if isinstance(value, tuple) else str(value)
        return environment

    def spawn(self) -> Host:
        self.process = subprocess.Popen([sys.executable, "-m", "kvshare", "node"], env=self.environment())
        assert eventually(lambda: Path(self.settings.socket_path).exists() and self._answers(), 20)
        return self

    def connect(self, space: Namespace = SPACE) -> kvshare.Cache:
        return kvshare.connect(space, block_bytes=BLOCK_BYTES, **dataclasses.asdict(self.settings))

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.node is not None:
            problems = self.node.check()
            self.node.stop()
            assert problems == []
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(20)

    def _answers(self) -> bool:
        from kvshare.messages import AskStatus
        from kvshare.session import call

        try:
            call(self.settings, AskStatus, 2.0)
        except kvshare.Unavailable:
            return False
        return True


class Cluster:
    """Pretended hosts and a directory, as one test needs them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.hosts: list[Host] = []
        self.directory: DirectoryServer | None = None
        self.shards: list[DirectoryServer] = []  # of a directory that is divided; then there is no other

    def settings(self, name: str, **changes: object) -> Settings:
        values: dict[str, object] = {
            "node_name": name, "runtime_dir": str(self._folder / "run"), "shm_dir": str(self._folder), "arena_bytes": 4 << 20,
            "arena_chunk_bytes": 1 << 20, "autostart": False, "secret": SECRET, "attach_seconds": 5.0,
            "transfer_seconds": 1.0, "publish_seconds": 0.005, "quarantine_seconds": 0.5, "transports": "tcp",
        }  # fmt: skip
        if self.directory is not None:
            values["directory"] = self.directory.endpoint
        if self.shards:
            values["directory"] = ",".join(shard.endpoint for shard in self.shards)
        return Settings.load(values | changes, environ={})

    def host(self, name: str, **changes: object) -> Host:
        host = Host(self.settings(name, **changes))
        self.hosts.append(host)
        return host

    def start_directory(self, port: int = 0, **changes: object) -> DirectoryServer:
        self.directory = DirectoryServer(Settings.load({"secret": SECRET, "port": port, **changes}, environ={}))
        self.directory.start()
        return self.directory

    def start_shards(self, count: int, **changes: object) -> list[DirectoryServer]:
        self.shards = [self._shard(number, count, 0, changes) for number in range(count)]
        return self.shards

    def start_shard_again(self, number: int, **changes: object) -> None:
        """In place of one that was stopped."""
        port = int(self.shards[number].endpoint.rpartition(":")[2])
        self.shards[number] = self._shard(number, len(self.shards), port, changes)

    def _shard(self, number: int, count: int, port: int, changes: dict[str, object]) -> DirectoryServer:
        settings = Settings.load({"secret": SECRET, "port": port, "directory_shards": count, **changes}, environ={})
        server = DirectoryServer(settings, number, count)
        server.start()
        return server

    def stop(self) -> None:
        for host in self.hosts:
            host.stop()
        for server in [*self.shards, *([self.directory] if self.directory is not None else [])]:
            server.stop()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.stop()
    assert not list(tmp_path.glob("kvshare-*")), "arena files stayed"
    assert not list(tmp_path.glob("run/*/*.sock")), "sockets stayed"
