"""Goal: the command's promises to people and scripts: exit status, one line for what is wrong, nothing left behind.

Method: the real command in processes of its own, with folders of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import kvshare
from kvshare import Settings, cli
from kvshare.keys import Namespace

BLOCK_BYTES = 8192
SPACE = Namespace(
    weights="blake2b:1", dtype="bf16", kv_dtype="bf16", block_size=4, page_bytes=4096, layers=2, kv_heads=1, head_size=64,
    hash_algorithm="kvshare-chain", hash_seed="", packing="test", label="test model",
)  # fmt: skip
TOKENS = list(range(40))
BLOCKS = np.arange(10 * BLOCK_BYTES, dtype=np.uint32).astype(np.uint8).reshape(10, BLOCK_BYTES)
SECONDS = 30.0


class Command:
    """The command ``kvshare`` with settings from the environment; servers that it started end with the test."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        names = ("runtime_dir", "shm_dir", "arena_bytes", "arena_chunk_bytes")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("KVSHARE_")}
        self._environment |= {f"KVSHARE_{name.upper()}": str(getattr(settings, name)) for name in names}
        self.servers: list[subprocess.Popen[str]] = []

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kvshare", *arguments]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=SECONDS, check=False)

    def serve(self, *arguments: str) -> subprocess.Popen[str]:
        """A server, which has said its first line: a node's log, or a directory's endpoint."""
        process = subprocess.Popen(
            [sys.executable, "-m", "kvshare", *arguments], env=self._environment, text=True, bufsize=1,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.servers.append(process)
        return process

    def node(self, *arguments: str) -> subprocess.Popen[str]:
        process = self.serve("node", *arguments)
        assert process.stdout is not None
        for line in process.stdout:
            if "listens at" in line:
                return process
        raise AssertionError("the node ended before it listened")

    def connect(self) -> kvshare.Cache:
        places = {"runtime_dir": self.settings.runtime_dir, "shm_dir": self.settings.shm_dir}
        return kvshare.connect(SPACE, block_bytes=BLOCK_BYTES, autostart=False, warm_bytes=0, **places)

    def files(self) -> list[str]:
        return [path.name for path in Path(self.settings.runtime_dir).rglob("*") if not path.is_dir()]


@pytest.fixture
def command(make_settings: Callable[..., Settings]) -> Iterator[Command]:
    made = Command(make_settings())
    yield made
    for process in made.servers:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> int:
    """Exit status of a server, when it has ended."""
    process.communicate(timeout=SECONDS)
    return process.returncode


def save_some(command: Command) -> None:
    with command.connect() as cache:
        assert cache.save(TOKENS, BLOCKS) == len(BLOCKS)


def one_line(text: str, *parts: str) -> bool:
    return text.count("\n") == 1 and text.startswith("kvshare: ") and all(part in text for part in parts)


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("arena_bytes=lots", ("'arena_bytes'", "'lots'", "512MiB")),
        ("arena_byts=1GiB", ("'arena_byts'", "'arena_bytes'")),
        ("arena_bytes", ("'arena_bytes'", "NAME=VALUE")),
    ],
)
def test_a_wrong_setting_is_one_line_and_status_2(
    setting: str, parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--set", setting]) == 2
    assert one_line(capsys.readouterr().err, *parts)


@pytest.mark.parametrize("question", ["status", "check", "wait-warm"])
def test_without_a_node_a_question_is_answered_by_status_1(
    question: str, make_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_settings().runtime_dir
    extra = ["--timeout", "0.3"] if question == "wait-warm" else []
    assert cli.main([question, "--set", f"runtime_dir={folder}", "--set", f"shm_dir={folder}", *extra]) == 1
    said = capsys.readouterr()
    assert (said.out + said.err).count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_node_in_good_order(command: Command, number: signal.Signals) -> None:
    node = command.node()
    save_some(command)
    node.send_signal(number)
    assert ended(node) == 0
    assert command.files() == []


def test_status_says_what_the_node_holds(command: Command) -> None:
    command.node()
    with command.connect() as cache:
        cache.save(TOKENS, BLOCKS)
        status = json.loads(command("status", "--json").stdout)
        assert (status["node"], status["directory"]) == ("node", "")
        assert status["sessions"] >= 1
        assert [region["slot_bytes"] for region in status["regions"]] == [BLOCK_BYTES]
        for_people = command("status").stdout
        assert f"slots of {BLOCK_BYTES} bytes" in for_people and status["regions"][0]["data_path"] in for_people


def test_a_second_node_of_that_name_is_refused_with_the_remedy(command: Command) -> None:
    command.node()
    second = command("node")
    assert second.returncode == 2
    assert one_line(second.stderr, "'node_name'", "kvshare stop")
    assert command("status").returncode == 0


def test_stop_ends_the_node_and_gives_its_memory_back(command: Command) -> None:
    node = command.node()
    save_some(command)
    assert command("stop").returncode == 0
    assert ended(node) == 0
    assert command.files() == []
    again = command("stop")
    assert (again.returncode, again.stdout[:12]) == (0, "no node runs")


def test_a_kept_arena_serves_the_next_node(command: Command) -> None:
    node = command.node("--keep-arena")
    save_some(command)
    node.terminate()
    assert ended(node) == 0
    command.node()
    with command.connect() as cache:
        loaded = np.zeros_like(BLOCKS)
        assert cache.match(TOKENS) == len(TOKENS)
        assert cache.load(TOKENS, loaded) == len(TOKENS)
        assert np.array_equal(loaded, BLOCKS)


def test_clean_removes_what_a_killed_node_left_and_nothing_of_a_living_one(command: Command) -> None:
    node = command.node()
    save_some(command)
    living = command.files()
    assert command("clean").stdout == "0 files removed\n"
    assert command.files() == living
    node.kill()
    ended(node)
    assert set(command.files()) == set(living)
    cleaned = command("clean")
    assert cleaned.returncode == 0 and cleaned.stdout.endswith(f"{len(living)} files removed\n")
    assert command.files() == []


def test_a_rotated_key_seals_from_now_on(make_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_settings().runtime_dir
    rotate = ["rotate-key", "--tenant", "acme", "--set", f"keys_dir={folder}"]
    said = []
    for _ in range(2):
        assert cli.main(rotate) == 0
        said.append(capsys.readouterr().out)
    (path,) = Path(folder).glob("*.key")
    key_ids = [line.split()[2] for line in path.read_text().splitlines()]
    assert [key_id in line for key_id, line in zip(key_ids, said, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--tenant", "acme"], ("'keys_dir'", "name the folder")),
        (["--tenant", "a b", "--set", "keys_dir=/tmp"], ("'a b'", "1 to 64 letters")),
        (["--tenant", "acme", "--set", "keys_dir=/nowhere"], ("'keys_dir'", "'/nowhere'")),
    ],
)
def test_a_key_that_cannot_be_rotated_is_one_line_and_status_2(
    given: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["rotate-key", *given]) == 2
    assert one_line(capsys.readouterr().err, *parts)


def test_an_autostarted_node_ends_when_nobody_needs_it(command: Command) -> None:
    node = command.serve("node", "--autostarted", "--set", "idle_exit_seconds=0.5")
    assert ended(node) == 0
    assert command.files() == []


def test_wait_warm_is_a_gate_that_opens_with_the_engines_plan(command: Command) -> None:
    command.node("--set", "warm_bytes=0")
    closed = command("wait-warm", "--timeout", "0.3")
    assert closed.returncode == 1 and one_line(closed.stderr, "not warm within 0.3 s")
    with command.connect():
        opened = command("wait-warm", "--timeout", "20")
    assert opened.returncode == 0 and opened.stdout.startswith("warm: 0 blocks wanted")


def test_check_finds_a_damaged_table(command: Command) -> None:
    command.node()
    save_some(command)
    sound = command("check")
    assert (sound.returncode, sound.stdout) == (0, "the node answers; 1 regions, 0 problems\n")
    (table,) = Path(command.settings.shm_dir).glob("kvshare-*.table")
    with open(table, "r+b") as file:
        file.write(b"garbage!")
    damaged = command("check")
    assert damaged.returncode == 1 and "1 problems" in damaged.stdout


def test_a_directory_says_where_it_listens_and_ends_in_good_order(command: Command) -> None:
    directory = command.serve("directory", "--set", "secret=of sixteen letters")
    assert directory.stdout is not None
    host, _, port = directory.stdout.readline().strip().rpartition(":")
    assert host == "127.0.0.1" and int(port) > 0
    directory.terminate()
    assert ended(directory) == 0


def test_a_directory_is_one_of_its_shards(command: Command) -> None:
    refused = command("directory", "--set", "secret=of sixteen letters", "--set", "directory_shards=2", "--shard", "2")
    assert refused.returncode == 2
    assert "option '--shard' cannot be 2: the directory has 2" in refused.stderr


def test_a_directory_without_a_secret_is_refused(command: Command) -> None:
    refused = command("directory")
    assert refused.returncode == 2 and one_line(refused.stderr, "'secret'")


def test_a_node_that_cannot_be_stopped_is_told_of(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stopped process answers nothing: `stop` gives up in bounded time and names the remedy."""
    node = command.node()
    monkeypatch.setattr(cli, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(cli, "STOP_SECONDS", 0.2)
    node.send_signal(signal.SIGSTOP)
    try:
        folder = command.settings.runtime_dir
        assert cli.main(["stop", "--set", f"runtime_dir={folder}", "--set", f"shm_dir={folder}"]) == 1
        assert one_line(capsys.readouterr().err, "did not stop within 0.2 s", "kvshare clean")
    finally:
        node.send_signal(signal.SIGCONT)
