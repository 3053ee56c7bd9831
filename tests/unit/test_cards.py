"""Goal: a process that Ray started attaches to the node of its own Ray node, or to none. Method: cards for real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvshare import ConfigError, Settings, cards


@pytest.fixture
def below_us(monkeypatch: pytest.MonkeyPatch, short_dir: Path) -> dict[str, str]:
    """The environment of a process below a raylet, which we pretend to be; cards lie where settings look for them."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_dir))
    return {cards.VARIABLE: str(os.getpid())}


def leave_card(cluster: str = "default", **settings: object) -> None:
    cards.write(Settings().runtime_dir, os.getpid(), cluster, {"cluster": cluster, "node_name": f"of-{cluster}", **settings})


def test_an_engine_without_settings_attaches_to_the_node_of_its_ray_node(below_us: dict[str, str]) -> None:
    leave_card(runtime_dir="/elsewhere", transports=["tcp"], secret="s" * 16, autostart=False)
    settings = Settings.load({}, below_us)
    assert (settings.socket_path, settings.transports) == ("/elsewhere/default/of-default.sock", ("tcp",))
    assert settings.secret == "s" * 16 and "ssss" not in repr(settings) and not settings.autostart


def test_environment_and_arguments_win_over_the_card(below_us: dict[str, str]) -> None:
    leave_card(warm_seconds=7.0, tcp_streams=3)
    settings = Settings.load({"tcp_streams": 4}, {**below_us, "KVSHARE_WARM_SECONDS": "8"})
    assert (settings.warm_seconds, settings.tcp_streams, settings.node_name) == (8.0, 4, "of-default")


@pytest.mark.parametrize("named", [{"node_name": "mine"}, {"runtime_dir": "/mine"}])
def test_who_names_a_node_gets_nothing_from_a_card(below_us: dict[str, str], named: dict[str, str]) -> None:
    leave_card(tcp_streams=3)
    assert Settings.load(named, below_us).tcp_streams == Settings().tcp_streams


def test_without_ray_or_without_a_card_defaults_hold(below_us: dict[str, str]) -> None:
    assert Settings.load({}, below_us) == Settings()
    leave_card()
    assert Settings.load({}, {}) == Settings()
    assert Settings.load({"cluster": "other"}, below_us).node_name == Settings().node_name


def test_the_only_cluster_is_taken_and_one_of_several_must_be_named(below_us: dict[str, str]) -> None:
    leave_card("blue")
    assert Settings.load({}, below_us).node_name == "of-blue"
    leave_card("green")
    assert Settings.load({"cluster": "green"}, below_us).node_name == "of-green"
    with pytest.raises(ConfigError, match=r"setting 'cluster' is missing: .* blue, green; name one of them\."):
        Settings.load({}, below_us)
    leave_card("default")
    assert Settings.load({}, below_us).node_name == "of-default"


def test_the_card_of_a_raylet_that_is_gone_is_void_and_removed(below_us: dict[str, str]) -> None:
    folder = Settings().runtime_dir
    raylet = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    cards.write(folder, raylet.pid, "default", {"node_name": "theirs"})
    environment = {cards.VARIABLE: str(raylet.pid)}
    assert cards.locate(folder, environment, None) == {"node_name": "theirs"}
    assert cards.remove_void(folder) == []
    raylet.communicate(b"\n")
    assert cards.locate(folder, environment, None) == {}
    assert len(cards.remove_void(folder)) == 1 and not list(Path(folder).iterdir())


def test_a_reused_process_id_does_not_mislead(below_us: dict[str, str]) -> None:
    leave_card()
    (path,) = Path(Settings().runtime_dir).iterdir()
    card = json.loads(path.read_text())
    card["raylet"][-1] += "1"  # another start time: an earlier process of our number
    path.write_text(json.dumps(card))
    assert Settings.load({}, below_us) == Settings()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"raylet": 7, "settings": {}}', '{"raylet": [], "settings": {}}'])
def test_what_is_no_card_is_not_read(below_us: dict[str, str], text: str) -> None:
    leave_card()
    (path,) = Path(Settings().runtime_dir).iterdir()
    path.write_text(text)
    assert Settings.load({}, below_us) == Settings()
    assert cards.remove_void(Settings().runtime_dir) == []


def test_a_link_is_not_followed_and_only_we_may_read_a_card(below_us: dict[str, str], tmp_path: Path) -> None:
    leave_card()
    (path,) = Path(Settings().runtime_dir).iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    path.rename(tmp_path / "card")
    path.symlink_to(tmp_path / "card")
    assert Settings.load({}, below_us) == Settings()


def test_a_card_is_replaced_and_taken_back(below_us: dict[str, str]) -> None:
    leave_card(tcp_streams=3)
    leave_card(tcp_streams=4)
    assert Settings.load({}, below_us).tcp_streams == 4
    for _ in range(2):
        cards.remove(Settings().runtime_dir, os.getpid(), "default")
    assert not list(Path(Settings().runtime_dir).iterdir())
