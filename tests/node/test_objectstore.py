"""Goal: blocks come back from an object store exactly as they were put, or not at all, whatever the store or its objects do.

Method: a real S3 server (moto's) in a process of its own, and a folder. Two `ObjectTier`s on one store are two machines. Faults
are real ones: the server is killed or stopped, checks credentials, objects are changed behind our back.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from kvshare import bucket, catalog, keys, native, segments
from kvshare.errors import ObjectStoreError
from kvshare.native import BlockStatus
from kvshare.objectstore import ObjectTier, PutBlock
from kvshare.vault import Vault

obstore = pytest.importorskip("obstore", reason="the object tier needs obstore")

KIB, MIB = 1 << 10, 1 << 20
LENGTH = 16 * KIB
SECONDS = 20.0  # patience with a server on a busy machine; the tests of slowness set their own
FAMILY = bytes(range(16))
MARK_BYTES = 26  # of a block's beginning, that no other block has


def key(number: int, tenant: str = "") -> bytes:
    return keys.prefix(FAMILY, tenant=keys.tenant_tag(tenant)) + number.to_bytes(32, "big")


def content(count: int, length: int = LENGTH) -> np.ndarray:
    """Seeded blocks, one a row. Each begins with a text that a search in files finds."""
    data = np.random.default_rng(count).integers(0, 256, (count, length), np.uint8)
    for number in range(count):
        mark = f"the secret of block {number:06d}".encode()
        data[number, : len(mark)] = np.frombuffer(mark, np.uint8)
    return data


def put_blocks(names: list[bytes], data: np.ndarray, expires: int = 0) -> list[PutBlock]:
    addresses = np.array([[native.address_of(row)] for row in data], np.uint64)
    lengths = np.full((len(data), 1), data.shape[1], np.uint64)
    sums = native.checksums(addresses, lengths, np.array(keys.seeds_of(names), np.uint64)).tolist()
    return [PutBlock(name, checksum, expires, row.data) for name, checksum, row in zip(names, sums, data, strict=True)]


def read(tier: ObjectTier, names: list[bytes], length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Statuses, and what landed."""
    landed = np.zeros((len(names), length), np.uint8)
    addresses = np.array([native.address_of(row) for row in landed], np.uint64)
    return tier.get(names, addresses, length), landed


def assert_right_or_missing(tier: ObjectTier, names: list[bytes], data: np.ndarray) -> int:
    """Wrong bytes never pass; returns how many blocks came."""
    statuses, landed = read(tier, names)
    good = statuses == BlockStatus.OK
    assert (landed[good] == data[good]).all()
    return int(good.sum())


class Store:
    """A place for one test: its URL, and a way around the tier to its objects."""

    def __init__(self, url: str, raw: obstore.store.ObjectStore) -> None:
        self.url = url
        self.raw = raw

    def tier(self, vault: Vault | None = None, segment_bytes: int = MIB, seconds: float = SECONDS) -> ObjectTier:
        return ObjectTier.open(self.url, "c", vault or Vault.open(""), segment_bytes, seconds)

    def names(self, folder: str = "") -> list[str]:
        return sorted(item["path"] for page in obstore.list(self.raw) for item in page if folder in item["path"])

    def read(self, name: str) -> bytes:
        return bytes(obstore.get(self.raw, name).bytes())

    def write(self, name: str, data: bytes) -> None:
        obstore.put(self.raw, name, data)

    def delete(self, name: str) -> None:
        obstore.delete(self.raw, name)

    def holds(self, text: bytes) -> bool:
        return any(text in self.read(name) for name in self.names())


class Server:
    """moto's S3 server in a process of its own."""

    def __init__(self, port: int = 0) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                self.request("GET", "/moto-api/")
                break
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, "the server does not start"
                time.sleep(0.05)

    def request(self, method: str, path: str, body: bytes | None = None) -> None:
        headers = {"content-type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(self.endpoint + path, body, headers, method=method), timeout=30).close()

    def bucket(self, name: str) -> None:
        self.request("PUT", f"/{name}")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    pytest.importorskip("moto", reason="the S3 server of the tests is moto's")
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server to be killed or stopped."""
    pytest.importorskip("moto", reason="the S3 server of the tests is moto's")
    server = Server()
    yield server
    server.stop()


def s3_store(monkeypatch: pytest.MonkeyPatch, server: Server, name: str) -> Store:
    credentials = {"AWS_ACCESS_KEY_ID": "AKIATEST", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    for variable, value in {**credentials, "AWS_ENDPOINT_URL": server.endpoint}.items():
        monkeypatch.setenv(variable, value)
    server.bucket(name)
    raw = obstore.store.S3Store(name, client_options={"allow_http": True})
    return Store(f"s3://{name}/some/prefix", raw)


def folder_store(folder: Path) -> Store:
    folder.mkdir(exist_ok=True)
    return Store(f"file://{folder}", obstore.store.LocalStore(folder))


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_server: Server) -> Store:
    if request.param == "file":
        return folder_store(tmp_path / "objects")
    return s3_store(monkeypatch, shared_server, f"b{time.time_ns()}")


@pytest.fixture
def quick_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that failed is tried again soon."""
    monkeypatch.setattr(bucket, "AWAY_SECONDS", 0.2)


def eventually(question: Callable[[], object], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if question():
            return True
        time.sleep(0.05)
    return False


# --- what is put comes back ------------------------------------------------------------------------------------------------


def test_another_machine_reads_what_one_has_put(store: Store) -> None:
    names, data = [key(i) for i in range(200)], content(200)
    writer, reader = store.tier(), store.tier()
    assert writer.put(put_blocks(names, data)) == 200
    assert reader.held(names) == [None] * 200  # it has not looked yet
    assert reader.refresh() == 200 and reader.refresh() == 0
    assert reader.held([*names, key(999)]) == [LENGTH] * 200 + [None]
    statuses, landed = read(reader, names)
    assert (statuses == BlockStatus.OK).all() and (landed == data).all()
    assert reader.held_blocks == 200 and reader.held_bytes == 200 * LENGTH
    assert len(store.names("manifests/")) == len(store.names("segments/")) == 200 * LENGTH // MIB + 1
    assert not writer.check() + reader.check()


def test_scattered_blocks_of_all_sizes_come_back(store: Store) -> None:
    """Ranges are read together and apart: neighbours, far ones, more than one request may have, and single large blocks."""
    rng = np.random.default_rng(7)
    tier = store.tier(segment_bytes=24 * MIB)
    for length in (100, 240, 4 * KIB, 60 * KIB, 2 * MIB, 3 * MIB):
        count = min(64, 30 * MIB // length)
        names, data = [key(i * 10_000 + length) for i in range(count)], content(count, length)
        assert tier.put(put_blocks(names, data)) == count
        for chosen in (np.arange(count), rng.permutation(count)[: count // 3 + 1], np.arange(0, count, 5)):
            statuses, landed = read(tier, [names[i] for i in chosen], length)
            assert (statuses == BlockStatus.OK).all() and (landed == data[chosen]).all()


def test_a_second_put_writes_nothing_and_a_wrong_length_is_a_miss(store: Store) -> None:
    names, data = [key(i) for i in range(4)], content(4)
    tier = store.tier()
    assert tier.put(put_blocks(names, data)) == 4
    there = store.names()
    assert tier.put(put_blocks(names, data)) == 4 and store.names() == there
    statuses, _ = read(tier, names, LENGTH // 2)
    assert (statuses == BlockStatus.STALE).all()


def test_a_block_that_changes_before_it_is_copied_is_left_out(store: Store) -> None:
    """The arena may give a slot away while its block waits to be put; whose bytes are there then must not get out."""
    names, data = [key(i) for i in range(4)], content(4)
    blocks = put_blocks(names, data)
    data[2] = np.frombuffer(b"what belongs to somebody else...", np.uint8).repeat(LENGTH // 32)
    tier = store.tier()
    assert tier.put(blocks) == 3
    assert tier.held(names) == [LENGTH, LENGTH, None, LENGTH]
    assert not store.holds(bytes(data[2, :64]))
    assert assert_right_or_missing(tier, names, data) == 3


def test_two_writers_of_one_block_cost_room_and_nothing_else(store: Store) -> None:
    names, data = [key(i) for i in range(8)], content(8)
    one, two = store.tier(), store.tier()
    assert one.put(put_blocks(names, data)) == two.put(put_blocks(names, data)) == 8
    third = store.tier()
    assert third.refresh() == 16
    assert assert_right_or_missing(third, names, data) == 8


def test_the_index_finds_the_newest_of_many_runs() -> None:
    """Adding and removing segments in any order, against a plain dictionary; the structure checks itself."""
    rng, index = np.random.default_rng(3), segments.BlockIndex()
    model: dict[bytes, dict[bytes, int]] = {}
    for turn in range(300):
        chosen = rng.choice(400, int(rng.integers(1, 30)), replace=False).tolist()
        records = np.zeros(len(chosen), segments.RECORD)
        for record, number in zip(records, chosen, strict=True):
            record["key"], record["key_bytes"], record["length"] = key(number), 64, turn + 1
        segment = segments.Segment(segments.new_id(turn), 1 << 20, records, [bytes(16)])
        index.add(segment)
        model[segment.id] = {key(number): turn + 1 for number in chosen}
        if turn % 3 == 0:
            victim = list(model)[int(rng.integers(len(model)))]
            assert index.remove(victim)
            del model[victim]
    newest: dict[bytes, int] = {}
    for held in model.values():
        newest |= held
    wanted = [key(number) for number in range(400)]
    found = index.find(wanted, 0)
    assert [block and block.length for block in found] == [newest.get(name) for name in wanted]
    assert index.blocks == sum(map(len, model.values())) and not index.check()


# --- what must go ----------------------------------------------------------------------------------------------------------


def test_after_a_purge_no_object_has_a_byte_of_it(store: Store) -> None:
    names, data = [key(i, "acme" if i % 3 else "other") for i in range(150)], content(150)
    tier, other = store.tier(), store.tier()
    assert tier.put(put_blocks(names, data)) == 150
    other.refresh()
    going = {name for name in names if keys.tenant_of(name) == keys.tenant_tag("acme")}
    assert tier.purge(going.__contains__) == (100, 100 * LENGTH)
    everything = b"".join(store.read(name) for name in store.names())
    for number, name in enumerate(names):
        assert (bytes(data[number, :MARK_BYTES]) in everything) == (name not in going)
    assert assert_right_or_missing(tier, names, data) == 50
    # Whoever knew the old segments finds nothing there, and learns of the new ones.
    assert assert_right_or_missing(other, names, data) == 0
    assert other.refresh() == 50 and assert_right_or_missing(other, names, data) == 50
    assert tier.purge(going.__contains__) == (0, 0)
    assert tier.purge(lambda _: True) == (50, 50 * LENGTH) and store.names() == []


def test_a_purge_removes_what_no_manifest_names(store: Store) -> None:
    """Segments of writers that died before their manifest, and those whose manifest is damaged."""
    names, data = [key(i) for i in range(10)], content(10)
    tier = store.tier()
    tier.put(put_blocks(names, data))
    [manifest] = store.names("manifests/")
    orphan, damaged = segments.new_id(1).hex(), segments.new_id(2).hex()
    for name in (orphan, damaged):
        store.write(manifest.replace("manifests", "segments").rpartition("/")[0] + f"/{name}", b"left behind " + bytes(data[0]))
    store.write(manifest.rpartition("/")[0] + f"/{damaged}", store.read(manifest)[:-1])
    tier.expire()
    assert store.holds(b"left behind")  # it might be a writer's that lives
    assert tier.purge(lambda _: False) == (0, 0)
    assert not store.holds(b"left behind") and len(store.names()) == 2
    assert assert_right_or_missing(tier, names, data) == 10


def purge_by_three_at_once(store: Store) -> None:
    """Each purges its quarter of the blocks; the last quarter stays, and nothing else."""
    names, data = [key(i) for i in range(240)], content(240)
    assert store.tier().put(put_blocks(names, data)) == 240
    tiers = [store.tier() for _ in range(3)]
    failures: list[BaseException] = []

    def purge(turn: int) -> None:
        going = {name for i, name in enumerate(names) if i % 4 == turn}
        try:
            tiers[turn].purge(going.__contains__)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=purge, args=(turn,)) for turn in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    fresh = store.tier()
    fresh.refresh()
    assert [i for i, length in enumerate(fresh.held(names)) if length is not None] == list(range(3, 240, 4))
    assert assert_right_or_missing(fresh, names, data) == 60
    everything = b"".join(store.read(name) for name in store.names())
    assert [i for i in range(240) if bytes(data[i, :MARK_BYTES]) in everything] == list(range(3, 240, 4))


def test_nodes_that_purge_at_once_lose_nothing_else_and_bring_nothing_back(store: Store) -> None:
    purge_by_three_at_once(store)


def test_nodes_that_purge_at_once_in_many_orders(tmp_path: Path) -> None:
    """In a folder a round takes milliseconds, so that many orders of events come up."""
    for turn in range(20):
        purge_by_three_at_once(folder_store(tmp_path / str(turn)))


def test_a_writer_whose_segment_is_condemned_knows_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A purge comes between segment and manifest, and takes the segment for a dead writer's."""
    names, data = [key(i) for i in range(8)], content(8)
    writer, purger = store.tier(), store.tier()
    really_put = bucket.Requests.put

    def put_and_purge(requests: bucket.Requests, path: str, body: memoryview) -> None:
        really_put(requests, path, body)
        assert purger.purge(lambda _: False) == (0, 0)

    with monkeypatch.context() as patch:
        patch.setattr(bucket.Requests, "put", put_and_purge)
        assert writer.put(put_blocks(names, data)) == 0
    assert store.names() == [] and writer.held(names) == [None] * 8
    assert writer.put(put_blocks(names, data)) == 8
    assert assert_right_or_missing(writer, names, data) == 8


def test_a_segment_that_is_committed_first_cannot_be_condemned(store: Store) -> None:
    """The purger had listed manifests before this one came."""
    names, data = [key(i) for i in range(8)], content(8)
    writer = store.tier()
    writer.put(put_blocks(names, data))
    [manifest] = store.names("manifests/")
    place = bucket.Bucket.open(store.url, "c", SECONDS)
    assert not place.call(partial(catalog.condemn, manifest.rpartition("/")[2]), writing=True)
    place.close()
    assert assert_right_or_missing(writer, names, data) == 8


def test_a_purge_looks_again_when_a_listed_manifest_is_gone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its listing and its reading another node rewrites the segment: the copy has what must go, under a new name."""
    names, data = [key(i) for i in range(9)], content(9)
    store.tier().put(put_blocks(names, data))
    other, purger = store.tier(), store.tier()
    other.refresh()
    really_list = bucket.Requests.list
    interrupted: list[tuple[int, int]] = []

    def list_and_interrupt(requests: bucket.Requests, folder: str, after: str = "") -> list[bucket.Listed]:
        listed = really_list(requests, folder, after)
        if not interrupted:
            interrupted.append((0, 0))
            interrupted[0] = other.purge(lambda name: name in names[:3])
        return listed

    monkeypatch.setattr(bucket.Requests, "list", list_and_interrupt)
    assert purger.purge(lambda name: name in names[3:6]) == (3, 3 * LENGTH)
    assert interrupted == [(3, 3 * LENGTH)]
    everything = b"".join(store.read(name) for name in store.names())
    assert [i for i in range(9) if bytes(data[i, :MARK_BYTES]) in everything] == [6, 7, 8]


def test_a_condemned_segment_is_removed_when_the_purger_died(store: Store) -> None:
    """It had put the empty manifest and no more. Nobody takes that for a damaged one."""
    names, data = [key(i) for i in range(8)], content(8)
    tier = store.tier()
    tier.put(put_blocks(names, data))
    [manifest] = store.names("manifests/")
    store.write(manifest, b"")
    other = store.tier()
    assert other.refresh() == 0 and other.held(names) == [None] * 8
    assert other.purge(lambda _: False) == (0, 0) and store.names() == []


def test_a_node_that_is_told_of_anothers_purge_counts_on_nothing(store: Store) -> None:
    names, data = [key(i) for i in range(4)], content(4)
    purger, told = store.tier(), store.tier()
    told.put(put_blocks(names, data))
    purger.purge(lambda _: True)
    assert told.forget(lambda name: name in names[:2]) == 2
    assert told.held(names) == [None, None, LENGTH, LENGTH]
    assert told.put(put_blocks(names[:2], data[:2])) == 2
    assert told.refresh() == 0 and told.held(names) == [LENGTH, LENGTH, None, None]
    assert assert_right_or_missing(told, names, data) == 2


def test_expired_blocks_are_not_served_and_their_room_comes_back(store: Store) -> None:
    names, data = [key(i) for i in range(64)], content(64)
    tier = store.tier(segment_bytes=8 * LENGTH)
    assert tier.put(put_blocks(names[:32], data[:32], expires=1000)) == 32  # long ago
    assert tier.put(put_blocks(names[32:], data[32:])) == 32
    assert tier.held(names) == [None] * 32 + [LENGTH] * 32
    later = put_blocks([key(99)], data[40:41], expires=4_000_000_000)
    assert tier.put(later) == 1 and tier.ends(key(99)) == 4_000_000_000 and tier.ends(key(98)) == tier.ends(names[40]) == 0
    statuses, _ = read(tier, names[:32])
    assert (statuses == BlockStatus.STALE).all()
    assert tier.expire() == 32 and tier.held_blocks == 33
    assert len(store.names()) == 10 and not store.holds(bytes(data[0, :MARK_BYTES]))
    assert assert_right_or_missing(tier, names, data) == 32


# --- encryption ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    pytest.importorskip("cryptography", reason="encryption needs it")
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    return Vault.open(str(folder))


def test_sealed_blocks_are_read_with_their_key_only_and_survive_a_rewrite(store: Store, vault: Vault, tmp_path: Path) -> None:
    names, data = [key(i, "acme") for i in range(40)], content(40)
    tier = store.tier(vault)
    assert tier.put(put_blocks(names, data)) == 40
    assert not store.holds(b"the secret of block")
    assert assert_right_or_missing(tier, names, data) == 40
    # A node without keys may rewrite, and reads nothing.
    keyless = store.tier()
    assert keyless.purge(lambda name: name in names[:20]) == (20, 20 * LENGTH)
    assert assert_right_or_missing(keyless, names, data) == 0
    tier.refresh()
    other = store.tier(vault)
    other.refresh()
    assert assert_right_or_missing(other, names, data) == 20
    assert vault.destroy(keys.tenant_tag("acme"))
    again = store.tier(vault)
    again.refresh()
    assert assert_right_or_missing(again, names, data) == 0


def test_a_sealed_block_in_anothers_place_does_not_unseal(store: Store, vault: Vault) -> None:
    names, data = [key(i, "acme") for i in range(2)], content(2)
    tier = store.tier(vault)
    tier.put(put_blocks(names, data))
    [segment] = store.names("segments/")
    body = store.read(segment)
    store.write(segment, body[LENGTH:] + body[:LENGTH])
    assert assert_right_or_missing(tier, names, data) == 0


# --- damaged objects -------------------------------------------------------------------------------------------------------


def test_wrong_bytes_in_a_segment_are_never_served(store: Store) -> None:
    names, data = [key(i) for i in range(16)], content(16)
    rng = np.random.default_rng(5)
    for damage in ("flip", "cut", "longer", "other", "empty", "gone"):
        writer = store.tier()
        writer.put(put_blocks(names, data))
        [segment] = store.names("segments/")
        body = bytearray(store.read(segment))
        if damage == "flip":
            for block in range(0, 16, 2):
                body[block * LENGTH + int(rng.integers(LENGTH))] ^= 1 << int(rng.integers(8))
        elif damage == "cut":
            del body[5 * LENGTH + 17 :]
        elif damage == "longer":
            body = bytearray(17) + body
        elif damage == "other":
            body = bytearray(b"<html>not found</html>" * 20_000)
        elif damage == "empty":
            body = bytearray()
        store.delete(segment) if damage == "gone" else store.write(segment, bytes(body))
        reader = store.tier()
        reader.refresh()
        expected = {"flip": 8, "cut": 5}.get(damage, 0)
        assert assert_right_or_missing(reader, names, data) == expected
        assert sum(length is not None for length in reader.held(names)) == expected  # not asked for again
        writer.purge(lambda _: True)
        assert store.names("segments/") == []
        for name in store.names():
            store.delete(name)


def test_a_damaged_manifest_is_skipped_and_said_once(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    names, data = [key(i) for i in range(3)], content(3)
    writer = store.tier()
    writer.put(put_blocks(names, data))
    [manifest] = store.names("manifests/")
    body = store.read(manifest)
    for at in range(0, len(body), 1 if len(body) < 64 else 7):
        flipped = bytearray(body)
        flipped[at] ^= 0x41
        store.write(manifest, bytes(flipped))
        reader = store.tier()
        assert reader.refresh() == 0 and reader.refresh() == 0
        assert assert_right_or_missing(reader, names, data) == 0
        assert store.read(manifest) == flipped  # nobody "repairs" it
    for text in (b"<html>", body[:-1], body[:21], body + b"\0"):
        store.write(manifest, text)
        assert store.tier().refresh() == 0
    caplog.clear()
    reader = store.tier()
    assert reader.refresh() == reader.refresh() == 0
    assert sum(manifest.rpartition("/")[2] in record.getMessage() for record in caplog.records) == 1


def test_a_newer_version_is_left_as_it_is(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    names, data = [key(i) for i in range(3)], content(3)
    store.tier().put(put_blocks(names, data))
    [manifest] = store.names("manifests/")
    body = bytearray(store.read(manifest))
    body[8] += 1
    store.write(manifest, bytes(body))
    there = {name: store.read(name) for name in store.names()}
    reader = store.tier()
    assert reader.refresh() == 0 and "upgrade kvshare" in caplog.text
    assert reader.expire() == 0
    with pytest.raises(ObjectStoreError, match="newer version"):
        reader.purge(lambda _: True)
    assert {name: store.read(name) for name in store.names()} == there


def test_what_others_keep_in_the_bucket_is_let_be(store: Store) -> None:
    tier = store.tier()
    tier.put(put_blocks([key(1)], content(1)))
    [manifest] = store.names("manifests/")
    foreign = [
        manifest.rpartition("/")[0] + "/readme.txt",
        manifest.replace("manifests", "segments").rpartition("/")[0] + "/x.bin",
    ]
    for name in foreign:
        store.write(name, b"hello")
    other = store.tier()
    assert other.refresh() == 1
    assert other.purge(lambda _: True) == (1, LENGTH)
    assert store.names() == sorted(foreign)


# --- a store that fails ----------------------------------------------------------------------------------------------------


def test_a_server_that_dies_is_a_miss_and_comes_back(
    own_server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, quick_return: None
) -> None:
    store = s3_store(monkeypatch, own_server, "bucket")
    names, data = [key(i) for i in range(64)], content(64)
    tier = store.tier()
    assert tier.put(put_blocks(names[:32], data[:32])) == 32
    own_server.stop()
    statuses, _ = read(tier, names[:32])
    assert (statuses == BlockStatus.UNREACHABLE).all()
    assert tier.put(put_blocks(names[32:], data[32:])) == 0
    with pytest.raises(ObjectStoreError):
        tier.refresh()
    with pytest.raises(ObjectStoreError):
        tier.purge(lambda _: True)
    assert tier.held(names) == [None] * 64 or not tier.away
    assert sum("AWS_ENDPOINT_URL" in record.getMessage() for record in caplog.records) == 1
    again = Server(own_server.port)
    try:
        again.bucket("bucket")  # moto forgets all it had
        assert eventually(lambda: tier.put(put_blocks(names[32:], data[32:])) == 32)
        assert "answers again" in caplog.text
        assert assert_right_or_missing(tier, names, data) == 32
    finally:
        again.stop()


def test_a_server_that_stops_answering_is_left_alone(
    own_server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After the first request that took too long nothing waits: the store is asked nothing more."""
    monkeypatch.setattr(bucket, "AWAY_SECONDS", 3600.0)
    store = s3_store(monkeypatch, own_server, "bucket")
    names, data = [key(i) for i in range(32)], content(32)
    writer = store.tier()
    assert writer.put(put_blocks(names, data)) == 32
    tier = store.tier(seconds=1.0)
    assert eventually(lambda: _refreshed(tier))
    own_server.process.send_signal(signal.SIGSTOP)
    statuses, _ = read(tier, names)
    assert (statuses == BlockStatus.UNREACHABLE).all() and tier.away
    own_server.process.send_signal(signal.SIGCONT)
    # It would answer now, but is not asked.
    statuses, _ = read(tier, names)
    assert (statuses == BlockStatus.UNREACHABLE).all() and tier.held(names) == [None] * 32
    assert tier.put(put_blocks([key(99)], data[:1])) == 0
    assert sum("object_seconds" in record.getMessage() for record in caplog.records) == 1


def _refreshed(tier: ObjectTier) -> bool:
    try:
        return tier.refresh() > 0
    except ObjectStoreError:
        return False


def test_wrong_credentials_are_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("moto", reason="the S3 server of the tests is moto's")
    server = Server()
    try:
        store = s3_store(monkeypatch, server, "bucket")
        names, data = [key(i) for i in range(4)], content(4)
        tier = store.tier()
        assert tier.put(put_blocks(names, data)) == 4
        server.request("POST", "/moto-api/reset-auth", b"0")  # from now on credentials are checked, and ours are nobody's
        statuses, _ = read(tier, names)
        assert (statuses == BlockStatus.UNREACHABLE).all()
        other = store.tier()
        with pytest.raises(ObjectStoreError, match="AWS_ACCESS_KEY_ID"):
            other.refresh()
        assert other.put(put_blocks(names, data)) == 0
        assert "denies reading" in caplog.text
    finally:
        server.stop()


class _Garbage(BaseHTTPRequestHandler):
    """Answers everything with success and nonsense."""

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        text = b"\xff\x00garbage " * 50
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.send_header("etag", '"x"')
        self.send_header("last-modified", "Tue, 24 Nov 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        pass


def test_a_store_that_answers_garbage_gives_misses(
    monkeypatch: pytest.MonkeyPatch, shared_server: Server, quick_return: None
) -> None:
    store = s3_store(monkeypatch, shared_server, f"b{time.time_ns()}")
    names, data = [key(i) for i in range(8)], content(8)
    garbage = ThreadingHTTPServer(("127.0.0.1", 0), _Garbage)
    thread = threading.Thread(target=garbage.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{garbage.server_address[1]}")
        tier = store.tier()
        with pytest.raises(ObjectStoreError):
            tier.refresh()
        tier.put(put_blocks(names, data))  # it says yes to everything
        assert eventually(lambda: not tier.away)
        assert assert_right_or_missing(tier, names, data) == 0
    finally:
        garbage.shutdown()
        thread.join()
        garbage.server_close()


NO_ROOM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.path.insert(0, sys.argv[2])
import test_objectstore as t
store = t.folder_store(t.Path(sys.argv[1]))
names, data = [t.key(i) for i in range(32)], t.content(32)
tier = store.tier(segment_bytes=t.MIB)
few, many = t.put_blocks(names[:4], data[:4]), t.put_blocks(names[4:], data[4:])
print(tier.put(few), tier.put(many), t.assert_right_or_missing(tier, names, data), len(store.names()))
"""


def test_a_folder_without_room_keeps_what_it_has(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the same failure of the same call."""
    command = [sys.executable, "-c", NO_ROOM, str(tmp_path / "objects"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["4", "0", "4", "2"], done.stderr
    assert "make room" in done.stderr
    assert not list((tmp_path / "objects").rglob("*#*"))


def test_what_a_writer_that_was_killed_has_left_is_purged(tmp_path: Path) -> None:
    store = folder_store(tmp_path / "objects")
    tier = store.tier()
    tier.put(put_blocks([key(1)], content(1)))
    part = tmp_path / "objects" / "c" / "segments" / f"{segments.new_id(1).hex()}#1"
    part.write_bytes(b"half of a segment")
    assert tier.purge(lambda _: False) == (0, 0)
    assert not part.exists() and len(store.names()) == 2


def test_a_folder_that_is_lost_is_a_miss(tmp_path: Path) -> None:
    store = folder_store(tmp_path / "objects")
    names, data = [key(i) for i in range(4)], content(4)
    tier = store.tier()
    assert tier.put(put_blocks(names, data)) == 4
    (tmp_path / "objects").rename(tmp_path / "elsewhere")
    statuses, _ = read(tier, names)
    assert (statuses == BlockStatus.STALE).all() and tier.held(names) == [None] * 4
    (tmp_path / "objects").write_text("a file is in its place")
    assert tier.put(put_blocks(names, data)) == 0


@pytest.mark.parametrize("url", ["file:///proc/1/nothing/here", "s3://"])
def test_an_unusable_url_is_refused_with_a_sentence(url: str) -> None:
    with pytest.raises(ObjectStoreError, match=r"operations\.md"):
        ObjectTier.open(url, "c", Vault.open(""), MIB, SECONDS)


def test_too_large_segments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectStoreError, match="object_segment_bytes"):
        ObjectTier.open(f"file://{tmp_path}", "c", Vault.open(""), 2 << 30, SECONDS)
