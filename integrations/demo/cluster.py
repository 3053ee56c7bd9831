"""The demo's Ray side: two raylets on this machine, kvshare on them, an engine on each; and that nothing of it stays.

Everything a run starts carries its mark in the environment, everything it writes lies in one folder of its own, and its arenas
carry its name: so what is left behind can be told, and removed, without touching anything else on the machine.

    host A (a raylet, killed later)     engine A, its kvshare node, its disk
    host B (the head raylet)            engine B, its kvshare node, its disk, the directory

The hosts' disks are folders in the run's folder: they outlive what runs on the hosts, and go with the run.

Ray is imported only by `Machine.start`: it reads where its files go from the environment.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kvshare.config import PREFIX, RESERVED, Settings
from kvshare.integrations.demo.engine import Engine, Ready

MARK = "DEMO_OF_KVSHARE_RUN"  # no setting of ours: those begin with KVSHARE_
SOCKET_BYTES_MAX = 40  # of the run's folder: Ray and we put sockets below it, whose names are short of space
WAIT_SECONDS = 60.0
CLOSE_SECONDS = 15.0
GONE_SECONDS = 15.0  # processes that were told to end take this long at most
ENGINE_SECONDS = 900.0  # to load a large model


class Machine:
    """One run's processes, files and memory. Start it, stop it, start it again, discard it; `stop` returns what it could not
    end in good order.

    arena_bytes: of each node; say: prints a line; verbose: show what Ray and the actors print.
    """

    def __init__(self, arena_bytes: int, say: Callable[[str], None], verbose: bool = False) -> None:
        self.run = f"demo-{os.getpid()}-{secrets.token_hex(3)}"
        self.folder = _private_folder()
        self._arena_bytes = arena_bytes
        self._say = say
        self._verbose = verbose
        self._shm_dir = Path(Settings().shm_dir)
        self._cluster: Any = None
        self._raylets: dict[str, Any] = {}
        self._hosts: dict[str, str] = {}  # Ray's id of a node -> "a" or "b"
        self._kvshare: Any = None
        self._engines: dict[str, Any] = {}
        self._ready: set[str] = set()  # hosts whose engine has started and can be told to end
        self._set_environment()

    def start(self, hosts: Sequence[str] = ("b", "a")) -> None:
        """A raylet for each of ``hosts``, the first one is Ray's head, and a kvshare node on each. Also after `stop`.

        Raises ConfigError, Unavailable, or Ray's own errors.
        """
        import ray
        from ray.cluster_utils import Cluster

        import kvshare.integrations.ray as kvshare_ray

        head, *others = hosts
        self._cluster = Cluster(initialize_head=True, head_node_args={**self._raylet(head), "include_dashboard": False})
        self._raylets = {head: self._cluster.head_node}
        for host in others:
            self._raylets[host] = self._cluster.add_node(**self._raylet(host))
        ray.init(address=self._cluster.address, log_to_driver=self._verbose, logging_level="ERROR")
        take_signals()  # back from Ray, whose handler of SIGTERM aborts this process after three seconds
        self._hosts = {node["NodeID"]: host for node in ray.nodes() for host in self._raylets if host in node["Resources"]}
        self._kvshare = kvshare_ray.start(
            cluster=self.run,
            transports=("tcp",),  # as between two hosts, although both are this machine
            runtime_dir=str(self.folder / "run"),
            arena_bytes=self._arena_bytes,
            lookup_seconds=0.5,  # all processes of two hosts share these few cores: be patient before a question is a miss
        )
        self._kvshare.wait(WAIT_SECONDS)

    def start_engine(self, host: str, environment: dict[str, str], **arguments: Any) -> tuple[Any, Ready]:
        """Handle of an `Engine` actor on host "a" or "b" once it has started, and what it says of itself."""
        import ray

        actor = (
            ray.remote(Engine)
            .options(num_cpus=0, resources={host: 1}, max_restarts=0, runtime_env={"env_vars": environment})
            .remote(**arguments)
        )
        self._engines[host] = actor
        ready = ray.get(actor.ready.remote(), timeout=ENGINE_SECONDS)
        self._ready.add(host)
        return actor, ready

    def nodes(self) -> dict[str, Any]:
        """State of each host's kvshare node (`kvshare.integrations.ray.NodeState`), by host."""
        return {self._hosts[node.ray_node]: node for node in self._kvshare.status().nodes}

    def keys(self) -> int:
        """Blocks that the directory can find."""
        return int(self._kvshare.status().keys)

    def wait_published(self, blocks: int, seconds: float) -> int:
        """Wait until the directory can find ``blocks`` blocks; returns what it can find after at most ``seconds``."""
        deadline = time.monotonic() + seconds
        while (found := self.keys()) < blocks and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def kill(self, host: str, pids: list[int]) -> None:
        """``kill -9`` of processes of ours on a host, then of everything else that Ray runs there."""
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self._cluster.remove_node(self._raylets.pop(host), allow_graceful=False)
        self._engines.pop(host, None)

    def stop(self) -> list[str]:
        """End all; idempotent. Returns what stayed although everything had been asked to end: a phrase each. That is then
        ended and removed by force."""
        self._stop_in_good_order()
        deadline = time.monotonic() + GONE_SECONDS
        while self._processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        left = [f"process {pid} ({name})" for pid, name in self._processes()]
        left += [f"file {path}" for path in self._files()]
        for pid, _ in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for path in self._files():
            path.unlink(missing_ok=True)
        return left

    def discard(self) -> None:
        """Remove the run's folder, logs included. Last."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """What Ray prints in this process goes to a file of the run: a dying raylet alone makes it print a hundred lines."""
        if self._verbose:
            yield
            return
        with open(self.folder / "driver.log", "w") as log:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                yield

    def keep_logs(self, target: Path) -> bool:
        """Copy what Ray, engines and nodes printed to ``target``, a folder for each start. True when there was anything."""
        sessions = [path for path in (self.folder / "ray").glob("session_*") if not path.is_symlink() and path.is_dir()]
        if not sessions:
            return False
        shutil.rmtree(target, ignore_errors=True)
        for number, session in enumerate(sorted(sessions, key=lambda path: path.stat().st_ctime), 1):
            shutil.copytree(session / "logs", target / str(number), ignore_dangling_symlinks=True, ignore=_other_than_text)
        if (self.folder / "driver.log").is_file():
            shutil.copy(self.folder / "driver.log", target)
        return True

    def _set_environment(self) -> None:
        """Of this process, before Ray is imported; all processes of the run inherit it."""
        for name in list(os.environ):
            if name.startswith(PREFIX) and name not in RESERVED:
                del os.environ[name]  # settings of the caller's own cluster are nothing to this one
        os.environ |= {
            MARK: self.run,
            "RAY_TMPDIR": str(self.folder),
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # we say which GPU an engine sees
        }
        (self.folder / "run").mkdir(mode=0o700)

    def _raylet(self, host: str) -> dict[str, Any]:
        """What the raylet of a host is started with. Its processes inherit where the host's disk is."""
        disk = {"KVSHARE_DISK_DIR": str(self.folder / f"disk-{host}")}
        return {"num_cpus": 1, "num_gpus": 0, "resources": {host: 1}, "env_vars": disk}

    def _stop_in_good_order(self) -> None:
        if self._cluster is None:
            return
        import ray
        import ray.exceptions

        cluster, self._cluster = self._cluster, None
        steps: list[Callable[[], object]] = []
        for host, actor in self._engines.items():
            if host in self._ready:
                steps.append(partial(self._close_engine, actor))
            steps.append(partial(ray.kill, actor))
        if self._kvshare is not None:
            steps.append(self._kvshare.stop)
        steps += [ray.shutdown, cluster.shutdown]
        self._kvshare, self._engines, self._ready = None, {}, set()
        for step in steps:
            try:
                step()
            except Exception as error:  # whatever it was, the next step is due; what stays is told by our caller
                self._say(f"  while stopping: {first_line(error)}")

    def _close_engine(self, actor: Any) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.GetTimeoutError):  # it is busy with what was interrupted
            ray.get(actor.close.remote(), timeout=CLOSE_SECONDS)

    def _processes(self) -> list[tuple[int, str]]:
        """Living processes that carry our mark, ourselves excepted."""
        found = []
        mark = f"{MARK}={self.run}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            pid = int(process.name)
            with contextlib.suppress(OSError):  # it has ended, or is not ours to look at
                if pid != os.getpid() and mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append((pid, (process / "comm").read_text().strip()))
        return found

    def _files(self) -> list[Path]:
        """Sockets, locks and cards in the run's folder, and its shared memory."""
        in_folder = [path for path in (self.folder / "run").rglob("*") if not path.is_dir()]
        return in_folder + list(self._shm_dir.glob(f"*{self.run}*"))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: cleanly."""

    former = take_signals()
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def take_signals() -> dict[signal.Signals, Any]:
    """Make SIGTERM and SIGHUP what Ctrl-C is; returns the former handlers."""
    return {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """While cleaning up, further Ctrl-C are ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    former = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _private_folder() -> Path:
    for parent in (tempfile.gettempdir(), "/tmp"):
        if len(parent) + len("/kvd-12345678") <= SOCKET_BYTES_MAX:
            return Path(tempfile.mkdtemp(prefix="kvd-", dir=parent))
    return Path(tempfile.mkdtemp(prefix="kvd-", dir="/tmp"))


def first_line(error: BaseException) -> str:
    """An error in one line. Of an error that crossed Ray the last line is the one that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _other_than_text(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith((".log", ".out", ".err")) and not (Path(folder) / name).is_dir()]
