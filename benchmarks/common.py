"""What the benchmarks share: a private fleet of processes (nodes, a directory, engines) that leaves nothing behind, and the
one way in which figures are printed and written.

Every process is a session leader of its own and is ended as a group, whatever happens; sockets lie in a temporary folder,
arena files carry the fleet's own name.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from kvshare.config import Settings
from kvshare.errors import Unavailable
from kvshare.leftovers import remove_leftovers
from kvshare.messages import AskStatus, NodeStatus
from kvshare.session import call

HERE = Path(__file__).resolve().parent
START_SECONDS = 300.0  # an engine imports for 25 s on a quiet machine
ANSWER_SECONDS = 600.0
STOP_SECONDS = 20.0
TOKENS = 4000  # of a prompt: 31 full blocks and 32 tokens that every way must compute
BLOCK_TOKENS = 128  # vLLM's own choice on a CPU
BLOCKS = TOKENS // BLOCK_TOKENS
VOCABULARY = 32000
SKIPPED = 77  # exit code: cannot be measured here, the last line on stderr says why
TRACE = HERE.parents[1] / "shared" / "data" / "mooncake" / "conversation_trace.jsonl"  # unless KVSHARE_TRACE says where


def arguments(description: str) -> argparse.Namespace:
    """``--json OUT`` and ``--quick``, as every benchmark has them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="few repetitions, for development: the figures are rough")
    return parser.parse_args()


def trace_path() -> Path:
    """Of the Mooncake conversation trace. Exits with `SKIPPED` where there is none."""
    path = Path(os.environ.get("KVSHARE_TRACE") or TRACE)
    if not path.is_file():
        print("no trace: let KVSHARE_TRACE name Mooncake's conversation_trace.jsonl", file=sys.stderr)
        sys.exit(SKIPPED)
    return path


def report(figures: dict[str, tuple[float, str]], detail: dict[str, Any], path: Path | None) -> None:
    """Print a line per figure (name -> value, unit) and write them, with all detail, where ``--json`` says.

    What else the machine had to do shows in the load average of the last 15 minutes.
    """
    for name, (value, unit) in figures.items():
        print(f"{name} {value:.4g} {unit}", flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        detail = {**detail, "load_average_15_min": round(os.getloadavg()[2], 2)}
        written = {name: {"value": value, "unit": unit} for name, (value, unit) in figures.items()}
        path.write_text(json.dumps({"figures": written, "detail": detail}, indent=1) + "\n")


def progress(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and the samples themselves, for a benchmark's detail."""
    values = np.asarray(samples, float)
    return {
        "median": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
        "n": len(samples),
        "samples": [round(float(value), 6) for value in values],
    }


def prompt(seed: int, tokens: int = TOKENS) -> list[int]:
    """Random token ids. Equal seeds, equal prompts, in every process."""
    return [int(token) for token in np.random.default_rng(seed).integers(10, VOCABULARY - 10, tokens)]


class Failed(RuntimeError):
    """A benchmark cannot go on; the message has the tail of the guilty process's log."""


class Child:
    """A process of the fleet, leader of its own session; what it prints goes to a log file."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path, *, talks: bool = False) -> None:
        self.name = name
        self._log_path = log
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else sink,
                stderr=sink,
                start_new_session=True,
            )

    def failed(self, reason: str) -> Failed:
        tail = "\n".join(self._log_path.read_text(errors="replace").splitlines()[-40:])
        return Failed(f"{self.name}: {reason}\n{tail}")

    def stop(self) -> None:
        """Ask, wait, then end the whole group; idempotent."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        elif self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def processor_seconds(self) -> float:
        """Processor time used so far by all living processes of this session, in user and kernel mode."""
        return sum(seconds for seconds, session in _processes() if session == self.process.pid)


def _processes() -> Iterator[tuple[float, int]]:
    """Processor seconds and session of every process. Threads are included; 10 ms steps."""
    tick = os.sysconf("SC_CLK_TCK")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()  # state ppid pgrp session ... utime stime
            yield (int(fields[11]) + int(fields[12])) / tick, int(fields[3])


class Engine(Child):
    """A vLLM engine in processes of its own (`engine_process.py`), spoken to in JSON lines."""

    def ask(self, seconds: float = ANSWER_SECONDS, **question: Any) -> dict[str, Any]:
        """One question, one answer. Raises Failed when the engine dies or does not answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise self.failed("has died") from error
        return self.answer(seconds)

    def answer(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        alarm = signal.signal(signal.SIGALRM, self._late)
        signal.setitimer(signal.ITIMER_REAL, max(0.1, deadline - time.monotonic()))
        try:
            line = self.process.stdout.readline()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
        if not line:
            raise self.failed("ended without an answer")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self.failed(answer["error"])
        return answer

    def _late(self, _signal: int, _frame: FrameType | None) -> None:
        raise self.failed("did not answer in time")

    def generate(self, prompts: list[list[int]], tokens: int = 1) -> dict[str, Any]:
        """``seconds`` of ``LLM.generate`` over all ``prompts``, ``tokens`` new ones each; ``outputs``: their ids."""
        return self.ask(do="generate", prompts=prompts, tokens=tokens)

    def seconds(self, token_ids: list[int]) -> float:
        """Time to first token of one prompt."""
        return float(self.generate([token_ids])["seconds"])


class Fleet:
    """A cluster of this benchmark's own. A context manager: everything it started is gone afterwards."""

    def __init__(self) -> None:
        self.cluster = f"bench-{os.getpid()}"
        self.folder = Path(tempfile.mkdtemp(prefix="kvb-"))
        self.secret = secrets.token_hex(16)
        self.directory = ""  # endpoint, once there is one
        self._children: list[Child] = []

    def __enter__(self) -> Fleet:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupted)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for child in reversed(self._children):
            child.stop()
        remove_leftovers(self.settings("node"))
        shutil.rmtree(self.folder, ignore_errors=True)

    def settings(self, node_name: str, **overrides: Any) -> Settings:
        given = {
            "cluster": self.cluster,
            "node_name": node_name,
            "runtime_dir": str(self.folder),
            "secret": self.secret,
            "directory": self.directory,
            "arena_bytes": 1 << 30,
            "autostart": False,
            "attach_seconds": 30.0,
            **overrides,
        }
        return Settings.load(given, {})

    def start_directory(self) -> Child:
        """A directory process; nodes and engines started afterwards know it."""
        port = _free_port()
        child = self._start("directory", ["directory"], self.settings("directory", port=port))
        endpoint = f"127.0.0.1:{port}"
        _until(lambda: _listens(port), child, "does not listen")
        self.directory = endpoint
        return child

    def start_node(self, settings: Settings, *, wait: bool = True) -> Child:
        child = self._start(f"node {settings.node_name}", ["node"], settings)
        if wait:
            _until(lambda: _answers(settings), child, "does not answer")
        return child

    def start_engine(
        self,
        name: str,
        settings: Settings | None,
        *,
        count: bool = False,
        toggled: bool = False,
        model: dict[str, Any] | None = None,
    ) -> Engine:
        """An engine attached by ``settings``, or one without kvshare; it works when this returns. ``count``: it counts the
        blocks it loads (vLLM's own statistics are on then); ``toggled``: its connector can be taken out (`toggle`);
        ``model``: arguments of `tiny_model`."""
        asked = {
            "folder": str(self.folder / "model"),
            "kvshare": settings is not None,
            "count": count,
            "toggled": toggled,
            "model": model or {},
        }
        command = [sys.executable, str(HERE / "engine_process.py"), json.dumps(asked)]
        environment = _environment(settings)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), environment.get("PYTHONPATH")]))
        # vLLM leaves its sockets and temporary files behind: they go with our folder.
        environment["VLLM_RPC_BASE_PATH"] = environment["TMPDIR"] = str(self.folder)
        engine = Engine(name, command, environment, self.folder / f"{name}.log", talks=True)
        self._children.append(engine)
        progress(f"{name}: starting")
        engine.answer(START_SECONDS)
        return engine

    def stop(self, child: Child) -> None:
        child.stop()
        self._children.remove(child)

    def _start(self, name: str, subcommand: list[str], settings: Settings) -> Child:
        command = [sys.executable, "-m", "kvshare", *subcommand]
        child = Child(name, command, _environment(settings), self.folder / f"{name.replace(' ', '-')}.log")
        self._children.append(child)
        return child


def node_status(settings: Settings) -> NodeStatus:
    answer = call(settings, AskStatus, 5.0)
    assert isinstance(answer, NodeStatus)
    return answer


def wait_saved(settings: Settings, blocks: int, seconds: float = 30.0) -> int:
    """Wait until the node holds ``blocks`` blocks or nothing new has come for a second. Returns what it has saved."""
    deadline = time.monotonic() + seconds
    saved = -1
    while (now := saved_blocks(settings)) < blocks and time.monotonic() < deadline and now != saved:
        saved = now
        time.sleep(1.0)
    return now


def saved_blocks(settings: Settings) -> int:
    return node_status(settings).counters.get("stored", 0)


def _environment(settings: Settings | None) -> dict[str, str]:
    """Ours without any KVSHARE_ setting of the caller's, plus ``settings``."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVSHARE_")}
    if settings is not None:
        for name in settings.__dataclass_fields__:
            value = getattr(settings, name)
            environment[f"KVSHARE_{name.upper()}"] = ",".join(value) if isinstance(value, tuple) else str(value)
    return environment


def _until(condition: Callable[[], bool], child: Child, reason: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if child.process.poll() is not None or time.monotonic() > deadline:
            raise child.failed(reason)
        time.sleep(0.1)


def _answers(settings: Settings) -> bool:
    try:
        node_status(settings)
    except Unavailable:
        return False
    return True


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _interrupted(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
