"""Sealed blocks: what unseals, what does not, and what becomes of keys that are shared, rotated, destroyed or away."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvshare import keys, vault
from kvshare.errors import ConfigError, VaultError
from kvshare.vault import UNSEALED, Sealed, Vault, associated

ACME, OTHER = keys.tenant_tag("acme"), keys.tenant_tag("other")
PLACE = bytes(range(16))
BLOCK = os.urandom(5000)
AAD = associated(PLACE, 3, b"k" * 64, len(BLOCK))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "keys"
    made.mkdir()
    yield made


def seal(one: Vault, tenant: bytes = ACME, aad: bytes = AAD) -> tuple[bytearray, Sealed]:
    target = bytearray(len(BLOCK))
    sealed = one.seal(tenant, aad, memoryview(BLOCK), memoryview(target))
    assert sealed is not None
    return target, sealed


def opened(one: Vault, data: bytes, sealed: Sealed, tenant: bytes = ACME, aad: bytes = AAD) -> bytes | None:
    target = bytearray(len(data))
    return bytes(target) if one.unseal(tenant, aad, sealed, memoryview(data), memoryview(target)) else None


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_what_was_sealed_unseals_and_is_not_what_lies_there(folder: Path) -> None:
    one = Vault.open(str(folder))
    data, sealed = seal(one)
    assert one.enabled and sealed.key_id != 0
    assert (len(sealed.nonce), len(sealed.tag)) == (12, 16)
    assert bytes(data) != BLOCK and BLOCK[:32] not in data
    assert opened(one, data, sealed) == BLOCK


def test_no_two_sealed_blocks_are_alike(folder: Path) -> None:
    one = Vault.open(str(folder))
    assert len({bytes(seal(one)[0]) for _ in range(50)}) == 50


@pytest.mark.parametrize("place", [0, 15])
@pytest.mark.parametrize("part", ["data", "nonce", "tag", "key_id"])
def test_one_changed_bit_anywhere_does_not_unseal(folder: Path, part: str, place: int) -> None:
    one = Vault.open(str(folder))
    data, sealed = seal(one)
    fields = {"data": bytes(data), "nonce": sealed.nonce, "tag": sealed.tag, "key_id": sealed.key_id.to_bytes(8, "little")}
    flipped = bytearray(fields[part])
    flipped[place % len(flipped)] ^= 1
    fields[part] = bytes(flipped)
    changed = Sealed(fields["nonce"], fields["tag"], int.from_bytes(fields["key_id"], "little"))
    assert opened(one, fields["data"], changed) is None
    assert opened(one, data, sealed) == BLOCK


@pytest.mark.parametrize(
    "aad",
    [
        associated(bytes(16), 3, b"k" * 64, len(BLOCK)),
        associated(PLACE, 4, b"k" * 64, len(BLOCK)),
        associated(PLACE, 3, b"K" + b"k" * 63, len(BLOCK)),
        associated(PLACE, 3, b"k" * 64, len(BLOCK) - 1),
    ],
)
def test_a_block_that_was_moved_does_not_unseal(folder: Path, aad: bytes) -> None:
    one = Vault.open(str(folder))
    data, sealed = seal(one)
    assert opened(one, data, sealed, aad=aad) is None


def test_a_tenants_block_is_nobody_elses(folder: Path) -> None:
    one = Vault.open(str(folder))
    data, sealed = seal(one)
    seal(one, OTHER)
    assert opened(one, data, sealed, tenant=OTHER) is None
    assert opened(one, data, sealed, tenant=keys.NO_TENANT) is None


def test_without_a_folder_blocks_stay_as_they_are() -> None:
    one = Vault.open("")
    data, sealed = seal(one)
    assert not one.enabled and (bytes(data), sealed) == (BLOCK, UNSEALED)
    assert opened(one, data, sealed) == BLOCK
    assert not one.destroy(ACME)


def test_a_vault_takes_no_block_that_is_not_sealed_and_without_a_vault_none_that_is(folder: Path) -> None:
    one = Vault.open(str(folder))
    data, sealed = seal(one)
    assert opened(one, BLOCK, UNSEALED) is None
    assert opened(Vault.open(""), data, sealed) is None


def test_threads_seal_and_unseal_at_once(folder: Path) -> None:
    one = Vault.open(str(folder))
    wrong: list[int] = []

    def work(number: int) -> None:
        for i in range(100):
            aad = associated(PLACE, 100 * number + i, b"k", len(BLOCK))
            data, sealed = seal(one, aad=aad)
            if opened(one, data, sealed, aad=aad) != BLOCK:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(list(folder.iterdir())) == 1


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_new_start_unseals_what_the_last_sealed(folder: Path) -> None:
    data, sealed = seal(Vault.open(str(folder)))
    assert opened(Vault.open(str(folder)), data, sealed) == BLOCK


def test_a_key_file_is_for_its_user_alone(folder: Path) -> None:
    seal(Vault.open(str(folder)))
    (path,) = folder.iterdir()
    assert path.name == f"{ACME.hex()}.key" and path.stat().st_mode & 0o777 == 0o600


def test_nodes_that_begin_at_once_agree_on_a_key(folder: Path) -> None:
    """Processes of their own, all let go at the same moment."""
    code = (
        "import sys; from kvshare.vault import Vault; one = Vault.open(sys.argv[1]); sys.stdout.write('.'); sys.stdout.flush();"
        "sys.stdin.read(1); target = bytearray(4);"
        "print(one.seal(b'tenant', b'place', memoryview(b'data'), memoryview(target)).key_id)"
    )
    nodes = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for node in nodes:
        assert node.stdout is not None and node.stdout.read(1) == "."
    ids = set()
    for node in nodes:
        assert node.stdin is not None
        node.stdin.write("\n")
        node.stdin.flush()
    for node in nodes:
        ids.add(node.communicate(timeout=60)[0].strip())
    assert len(ids) == 1 and len(list(folder.iterdir())) == 1


def test_who_loses_the_race_uses_the_winners_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    winner, loser = Vault.open(str(folder)), Vault.open(str(folder))
    link, made = os.link, []

    def late(source: Path, target: Path) -> None:
        if not made:
            made.append(True)
            made.append(seal(winner))
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert seal(loser)[1].key_id == made[1][1].key_id
    assert opened(loser, *made[1]) == BLOCK


def test_after_a_rotation_the_new_key_seals_and_the_old_still_unseals(folder: Path) -> None:
    one, other = Vault.open(str(folder)), Vault.open(str(folder))
    before = seal(other)
    new = one.rotate(ACME)
    after = seal(one)
    assert after[1].key_id == new != before[1].key_id
    # The other has looked a moment ago; an id that it does not know makes it look again.
    assert opened(other, *after) == BLOCK
    assert seal(other)[1].key_id == new
    assert [opened(Vault.open(str(folder)), *block) for block in (before, after)] == [BLOCK, BLOCK]


def test_rotation_makes_a_first_key_and_ends_at_a_limit(folder: Path) -> None:
    one = Vault.open(str(folder))
    ids = {one.rotate(ACME) for _ in range(vault.SECRETS_MAX)}
    assert len(ids) == vault.SECRETS_MAX
    with pytest.raises(VaultError, match="64 secrets"):
        one.rotate(ACME)
    assert seal(one)[1].key_id in ids


def test_a_torn_line_costs_its_own_key_only(folder: Path) -> None:
    one = Vault.open(str(folder))
    block = seal(one)
    (path,) = folder.iterdir()
    with path.open("ab") as file:
        file.write(b"kvshare-key 1 0123")
    after = Vault.open(str(folder))
    assert opened(after, *block) == BLOCK
    new = after.rotate(ACME)
    assert seal(after)[1].key_id == new
    assert opened(Vault.open(str(folder)), *block) == BLOCK


def test_what_is_destroyed_is_read_by_nobody_and_the_next_key_is_another(folder: Path) -> None:
    one = Vault.open(str(folder))
    data, sealed = seal(one)
    kept = seal(one, OTHER)
    file = (folder / f"{ACME.hex()}.key").open("rb")
    assert one.destroy(ACME) and not one.destroy(ACME)
    assert opened(one, data, sealed) is None
    assert set(file.read()) == {0}
    file.close()
    assert [path.name for path in folder.iterdir()] == [f"{OTHER.hex()}.key"]
    assert opened(one, *kept, tenant=OTHER) == BLOCK
    assert seal(one)[1].key_id != sealed.key_id
    assert opened(one, data, sealed) is None
    assert opened(Vault.open(str(folder)), data, sealed) is None


def test_who_shares_the_folder_forgets_what_was_destroyed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Vault.open(str(folder)), Vault.open(str(folder))
    block = seal(one)
    assert opened(other, *block) == BLOCK
    one.destroy(ACME)
    monkeypatch.setattr(vault, "FRESH_SECONDS", 0.0)  # the time that it may take has passed
    assert opened(other, *block) is None
    assert seal(other)[1].key_id != block[1].key_id


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys_dir", ["{folder}/missing", "{folder}/file", "/proc"])
def test_a_folder_that_cannot_be_used_is_refused_at_the_start(folder: Path, keys_dir: str) -> None:
    (folder / "file").touch()
    with pytest.raises(ConfigError, match=r"'keys_dir'.*use a folder that this user alone can read and write"):
        Vault.open(keys_dir.format(folder=folder))


def test_a_key_file_that_others_may_read_is_refused(folder: Path) -> None:
    one = Vault.open(str(folder))
    block = seal(one)
    (path,) = folder.iterdir()
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="may be read by other users: chmod 600"):
        Vault.open(str(folder))
    assert path.exists()
    path.chmod(0o600)
    assert opened(Vault.open(str(folder)), *block) == BLOCK


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "is no key file of kvshare, or is damaged"),
        (bytes(96), "is no key file of kvshare, or is damaged"),
        (b"kvshare-key 1 zz zz\n", "is no key file of kvshare, or is damaged"),
        (b"\xff\xfe\n\n", "is no key file of kvshare, or is damaged"),
        (b"kvshare-key 2 whatever comes\n", "is of version 2, ours is 1"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_and_left_alone(folder: Path, text: bytes, sentence: str) -> None:
    one = Vault.open(str(folder))
    path = folder / f"{ACME.hex()}.key"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=sentence):
        Vault.open(str(folder))
    assert one.seal(ACME, AAD, memoryview(BLOCK), memoryview(bytearray(len(BLOCK)))) is None
    assert path.read_bytes() == text


def test_a_key_file_overwritten_underneath_is_trusted_no_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Vault.open(str(folder))
    block = seal(one)
    (path,) = folder.iterdir()
    path.write_bytes(bytes(path.stat().st_size))
    monkeypatch.setattr(vault, "FRESH_SECONDS", 0.0)
    assert opened(one, *block) is None


def test_a_folder_that_goes_away_ends_sealing_with_one_sentence_and_reading_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = Vault.open(str(folder))
    block = seal(one)
    away = folder.with_name("away")
    folder.rename(away)
    monkeypatch.setattr(vault, "FRESH_SECONDS", 0.0)
    with caplog.at_level(logging.WARNING, "kvshare"):
        for _ in range(3):
            assert one.seal(ACME, AAD, memoryview(BLOCK), memoryview(bytearray(len(BLOCK)))) is None
    assert len(caplog.records) == 1 and "'keys_dir'" in caplog.text
    assert opened(one, *block) == BLOCK
    with pytest.raises(VaultError, match="keys_dir is away"):
        one.destroy(ACME)
    with pytest.raises(VaultError, match="make keys_dir writable"):
        one.rotate(ACME)
    away.rename(folder)
    assert opened(one, *block) == BLOCK
    assert seal(one)[1].key_id == block[1].key_id


def test_without_the_library_one_sentence_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r"kvshare\[encrypt\]"):
        Vault.open(str(folder))


def test_tenants_beyond_the_limit_are_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault, "TENANTS_MAX", 3)
    one = Vault.open(str(folder))
    blocks = {tag: seal(one, tag) for tag in (keys.tenant_tag(f"t{i}") for i in range(8))}
    assert all(opened(one, *block, tenant=tag) == BLOCK for tag, block in blocks.items())
    shutil.rmtree(folder)
    assert sum(opened(one, *block, tenant=tag) == BLOCK for tag, block in blocks.items()) == 3
