"""Real engines and nodes, each in a process of its own. Engines are dear (10 to 25 s): a module shares what it can."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvshare.config import Settings
from kvshare.errors import Unavailable
from kvshare.integrations.testing import engine_environment, tiny_model
from kvshare.messages import AskStatus, NodeStatus
from kvshare.session import call

CHILD = Path(__file__).with_name("engine_child.py")
START_SECONDS, ANSWER_SECONDS = 200.0, 120.0
VOCABULARY = 32000


def prompt(seed: int, tokens: int) -> list[int]:
    """Random token ids, equal for equal seeds; a shorter one is a prefix of a longer one."""
    return np.random.default_rng(seed).integers(10, VOCABULARY - 10, 8192)[:tokens].tolist()


def eventually(question: Callable[[], object], seconds: float = 30.0) -> bool:
    """True as soon as ``question()`` is; False when it is not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if question():
            return True
        time.sleep(0.05)
    return False


def real_model(folder: Path, seed: int = 0, **sizes: int) -> str:
    """`tiny_model` with a checkpoint of seeded weights, large enough that every token's output depends on the whole prompt:
    dummy weights are so small that a wrong block would hardly show."""
    from safetensors.torch import save_file

    path = Path(tiny_model(folder, **{"layers": 4, "hidden": 256, "heads": 4, "kv_heads": 2} | sizes))
    config = json.loads((path / "config.json").read_text())
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, values = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens": (config["vocab_size"], width), "lm_head": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj": (queries, width), f"{layer}.self_attn.k_proj": (values, width),
            f"{layer}.self_attn.v_proj": (values, width), f"{layer}.self_attn.o_proj": (width, queries),
            f"{layer}.mlp.gate_proj": (inner, width), f"{layer}.mlp.up_proj": (inner, width),
            f"{layer}.mlp.down_proj": (width, inner),
        }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.weight": (torch.randn(shape, generator=generator) * 2.0 / shape[1] ** 0.5).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    norms = ["model.norm", *(f"model.layers.{i}.{kind}_layernorm" for i in range(config["num_hidden_layers"])
                             for kind in ("input", "post_attention"))]  # fmt: skip
    tensors |= {f"{name}.weight": torch.ones(width, dtype=torch.bfloat16) for name in norms}
    save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})
    return str(path)


class ChildFailed(Exception):
    """The engine raised; the message is what it said."""


class EngineChild:
    """A process that holds an engine. ``ask`` its methods (`engine_child.Engine`) by name."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self.log_path = log
        self._log_begin = 0
        base = {name: value for name, value in os.environ.items() if not name.startswith("KVSHARE_")}
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink,
                env=base | engine_environment() | environment, start_new_session=True, text=True,
            )  # fmt: skip
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def log(self) -> str:
        """What it has printed since its last engine was started."""
        return self.log_path.read_bytes()[self._log_begin :].decode(errors="replace")

    def said(self, text: str) -> list[str]:
        """Lines of its log with ``text``."""
        return [line for line in self.log.splitlines() if text in line]

    def tell(self, do: str, **question: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **question}) + "\n")
        self.process.stdin.flush()

    def answer(self, seconds: float = ANSWER_SECONDS) -> Any:
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            pytest.fail(f"no answer within {seconds} s\n{self.log[-3000:]}")
        if not line:
            pytest.fail(f"the engine's process ended\n{self.log[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise ChildFailed(answer["error"])
        return answer["result"]

    def ask(self, do: str, **question: Any) -> Any:
        if do == "start":
            self._log_begin = self.log_path.stat().st_size
        self.tell(do, **question)
        return self.answer(START_SECONDS if do == "start" else ANSWER_SECONDS)

    def start(self, arguments: dict[str, Any], connector: dict[str, Any] | None, **options: Any) -> None:
        self.ask("start", arguments=arguments, connector=connector, **options)

    def stop(self) -> None:
        """End the engine, keep the process: importing vLLM is what costs."""
        self.ask("stop")

    def generate(self, *prompts: list[int], **options: Any) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.ask("generate", prompts=list(prompts), **options)
        return result

    def close(self) -> None:
        """End it by closing its input; whatever is left of its group after that is killed, and told by a failed assertion."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(60)
        finally:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait()
            self._reader.join(10)
            if self.process.stdout is not None:
                self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")


class House:
    """A host of the tests' own: folders, settings, a node that can be killed, engines."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        # Sockets have short names: not under pytest's long ones.
        self.run = Path(tempfile.mkdtemp(prefix="kvt-"))
        self.settings = Settings.load(
            {
                "cluster": f"test-{os.getpid()}-{secrets.token_hex(3)}", "runtime_dir": str(self.run),
                "arena_bytes": "512MiB", "autostart": False, "attach_seconds": 20.0, "quarantine_seconds": 0.5,
            }
            | changes,
            environ={},
        )  # fmt: skip
        self.node: subprocess.Popen[bytes] | None = None
        self.engines: list[EngineChild] = []

    @property
    def given(self) -> dict[str, Any]:
        """The settings as an engine's ``kv_connector_extra_config``."""
        default = Settings.load({}, environ={})
        values = dataclasses.asdict(self.settings)
        return {name: value for name, value in values.items() if value != getattr(default, name)}

    def start_node(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KVSHARE_")}
        for name, value in self.given.items():
            environment[f"KVSHARE_{name.upper()}"] = ",".join(value) if isinstance(value, tuple) else str(value)
        with (self.folder / "node.log").open("ab") as sink:
            self.node = subprocess.Popen([sys.executable, "-m", "kvshare", "node"], env=environment, stdout=sink, stderr=sink)
        assert eventually(lambda: self.status() is not None), (self.folder / "node.log").read_text()

    def kill_node(self) -> None:
        assert self.node is not None
        self.node.kill()
        self.node.wait()
        self.node = None

    def status(self) -> NodeStatus | None:
        try:
            status = call(self.settings, AskStatus, 5.0)
        except Unavailable:
            return None
        assert isinstance(status, NodeStatus)
        return status

    def counter(self, name: str) -> int:
        status = self.status()
        return 0 if status is None else status.counters.get(name, 0)

    def saved(self, blocks: int) -> bool:
        """True when the node holds that many blocks."""
        return eventually(lambda: self.counter("stored") >= blocks)

    def child(self, name: str, **environment: str) -> EngineChild:
        """A process whose engine has a scheduler's and a worker's process beside it, as `vllm serve` has."""
        child = EngineChild(self.folder / f"{name}.log", environment)
        self.engines.append(child)
        return child

    def arena_files(self) -> list[Path]:
        """Of all nodes of this cluster, whatever their names."""
        stem = Path(dataclasses.replace(self.settings, node_name="").arena_stem)
        return sorted(stem.parent.glob(f"{stem.name}*"))

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        if self.node is not None:
            self.node.terminate()
            self.node.wait(20)
        shutil.rmtree(self.run, ignore_errors=True)


@pytest.fixture(scope="session")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineChild]:
    """One process in which modules start one engine after the other, scheduler and worker within it."""
    made = EngineChild(tmp_path_factory.mktemp("child") / "child.log", {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    yield made
    made.close()
    assert made.process.returncode == 0, made.log[-3000:]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    made = House(tmp_path_factory.mktemp("house"))
    try:
        yield made
    finally:
        made.close()
    left = made.arena_files()
    for path in left:
        path.unlink()
    assert not left, "arena files stayed"
