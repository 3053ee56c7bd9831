"""Settings: read once, validated once; whatever is wrong is one sentence naming setting, value and remedy."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from kvshare.config import GIB, MIB, Settings, parse_bytes
from kvshare.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SECRET = "0123456789abcdef"
NAMES = [field.name for field in dataclasses.fields(Settings)]


def test_without_anything_given_the_defaults_hold() -> None:
    settings = Settings.load({}, {})
    assert settings == Settings()
    assert settings.arena_bytes == 4 * GIB
    assert settings.transports == ("shm", "process", "nixl", "tcp")


def test_environment_beats_defaults_and_overrides_beat_environment() -> None:
    environ = {"KVSHARE_ARENA_BYTES": "8GiB", "KVSHARE_TCP_STREAMS": "3", "PATH": "/bin"}
    settings = Settings.load({"tcp_streams": 5}, environ)
    assert settings.arena_bytes == 8 * GIB
    assert settings.tcp_streams == 5


def test_the_process_environment_is_read_when_no_other_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSHARE_CLUSTER", "blue")
    assert Settings.load().cluster == "blue"


def test_settings_cannot_be_rewritten() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().arena_bytes = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("arena_bytes", "64MiB", 64 * MIB),
        ("arena_bytes", "1.5g", 3 * GIB // 2),
        ("arena_bytes", "2000000", 2_000_000),
        ("warm_bytes", "2 GB", 2 * 10**9),
        ("autostart", "no", False),
        ("autostart", "TRUE", True),
        ("transports", "tcp", ("tcp",)),
        ("transports", "tcp, shm", ("tcp", "shm")),
        ("lookup_seconds", "0.25", 0.25),
        ("warm_seconds", "0", 0.0),
        ("idle_exit_seconds", "0", 0.0),
    ],
)
def test_text_is_read_as_people_write_it(name: str, text: str, value: object) -> None:
    environ = {"KVSHARE_ARENA_CHUNK_BYTES": "1MiB", f"KVSHARE_{name.upper()}": text}
    assert getattr(Settings.load({}, environ), name) == value


BAD: list[tuple[str, Any, str]] = [
    ("cluster", "a b", "letters"),
    ("node_name", "", "letters"),
    ("node_name", "../x", "letters"),
    ("runtime_dir", "/" + "x" * 120, "shorter path"),
    ("arena_bytes", "lots", "'512MiB'"),
    ("arena_bytes", -1, "or more"),
    ("arena_bytes", True, "'512MiB'"),
    ("arena_chunk_bytes", 8 * GIB, "at most arena_bytes"),
    ("index_keys_max", 0, "1 or more"),
    ("bind", 7, "text"),
    ("port", 70000, "0 to 65535"),
    ("directory", "somewhere", "'host:port'"),
    ("directory", "10.0.0.1:7000,", "'host:port'"),
    ("directory", "10.0.0.1:7000 10.0.0.2:7000", "with commas"),
    ("directory", "10.0.0.1:7000, 10.0.0.1:7000", "each once"),
    ("directory", ",".join(f"10.0.0.1:{port}" for port in range(7000, 7065)), "1 to 64 shards"),
    ("directory_shards", 0, "1 to 64"),
    ("directory_shards", 65, "1 to 64"),
    ("transports", "rdma", "shm, process, nixl, tcp"),
    ("transports", (), "at least one"),
    ("tcp_streams", 0, "1 or more"),
    ("tcp_streams", 65, "1 to 64"),
    ("tcp_bytes_per_second", -1, "0 or more"),
    ("tcp_bytes_per_second", 1000, "1MB or more"),
    ("message_bytes_max", 10, "or more"),
    ("lookup_seconds", 0, "positive number of seconds"),
    ("lookup_seconds", "soon", "seconds"),
    ("transfer_seconds", -1.0, "positive number of seconds"),
    ("transfer_seconds", float("nan"), "positive number of seconds"),
    ("heartbeat_seconds", float("inf"), "positive number of seconds"),
    ("warm_bytes", -5, "0 or more"),
    ("warm_group_ranks", 1, "2 to 63, or 0"),
    ("warm_group_ranks", 64, "2 to 63, or 0"),
    ("warm_gather_seconds", 0, "positive"),
    ("autostart", "perhaps", "true"),
    ("save_bytes_max", -1, "0 or more"),
    ("load_bytes_max", -1, "0 or more"),
]


@pytest.mark.parametrize(("name", "value", "remedy"), BAD)
def test_a_bad_setting_is_one_sentence_with_setting_value_and_remedy(name: str, value: object, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.load({name: value}, {})
    sentence = str(caught.value)
    assert name in sentence
    assert repr(value) in sentence
    assert remedy in sentence
    assert sentence.endswith(".") and "\n" not in sentence


def test_a_bad_value_from_the_environment_names_the_variable_as_it_was_spelled() -> None:
    with pytest.raises(ConfigError, match=r"'KVSHARE_TCP_STREAMS' cannot be 'many'"):
        Settings.load({}, {"KVSHARE_TCP_STREAMS": "many"})


def test_an_unknown_setting_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'arena_byte' \(value '8GiB'\): did you mean 'arena_bytes'\?"):
        Settings.load({"arena_byte": "8GiB"}, {})
    with pytest.raises(ConfigError, match=r"unknown setting 'KVSHARE_WARM_SECOND'.*'warm_seconds'"):
        Settings.load({}, {"KVSHARE_WARM_SECOND": "3"})


def test_an_unknown_setting_like_no_other_lists_all() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.load({"zzzzzz": 1}, {})
    assert all(name in str(caught.value) for name in NAMES)


def test_a_cluster_needs_a_secret_and_the_message_does_not_show_it() -> None:
    with pytest.raises(ConfigError, match="secret of 16 characters or more") as caught:
        Settings.load({"directory": "10.0.0.1:7000", "secret": "hunter2"}, {})
    assert "hunter2" not in str(caught.value)
    assert Settings.load({"directory": "10.0.0.1:7000", "secret": SECRET}, {}).secret == SECRET


def test_the_shards_of_a_directory_are_named_in_order() -> None:
    assert Settings().directories == ()
    both = Settings.load({"directory": "10.0.0.2:7000, 10.0.0.1:7000", "secret": SECRET}, {})
    assert both.directories == ("10.0.0.2:7000", "10.0.0.1:7000")


def test_paths_of_two_nodes_or_clusters_on_one_host_differ() -> None:
    one = Settings.load({"runtime_dir": "/run/k"}, {})
    for other in ({"node_name": "b"}, {"cluster": "blue"}):
        two = Settings.load({"runtime_dir": "/run/k", **other}, {})
        assert one.socket_path != two.socket_path
        assert one.arena_stem != two.arena_stem


@pytest.mark.parametrize("text", ["", "GiB", "5 apples", "-3", "1e9", "0x10"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_bytes(text)


def _documented(path: str) -> dict[str, str]:
    """Settings in a table of a document: name -> default as written."""
    rows = re.findall(r"^\| `([a-z_]+)` \| (?:`([^`]*)` )?\|", (ROOT / path).read_text(), re.MULTILINE)
    return dict(rows)


def test_the_documented_settings_are_the_settings_with_their_defaults() -> None:
    documented = _documented("README.md")
    assert list(documented) == NAMES
    for field in dataclasses.fields(Settings):
        if field.name != "runtime_dir":  # depends on the user and the machine
            assert Settings.load({field.name: documented[field.name]}, {}) == Settings(), field.name
