"""What the scheduler's half of the vLLM hook loads and saves, played against a session that is a set of keys."""

from __future__ import annotations

import pickle
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM's and torch's own making
    pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.base")

from kvshare.integrations.vllm.metadata import NOTHING, Reads, StepMetadata
from kvshare.integrations.vllm.scheduler_half import SchedulerHalf
from kvshare.keys import NO_TENANT, Namespace, tenant_of, tenant_tag
from kvshare.loading import LoadPlan, Measured, Offer, SourceRead
from kvshare.places import RegionDescription
from kvshare.question import Local, Mirror

BLOCK_SIZE, BLOCK_BYTES = 4, 1000


class HeldChain:
    def __init__(self, session: HeldSession, prefix: bytes, hashes: list[bytes]) -> None:
        self.session, self.prefix, self.hashes = session, prefix, list(hashes)
        self.hits: int | None = None

    def available(self, start: int) -> int | None:
        if self.session.travelling:
            return None
        held = [self.prefix + block_hash in self.session.held for block_hash in self.hashes[start:]]
        return held.index(False) if False in held else len(held)

    def offer(self, start: int, count: int) -> Offer:
        return Offer(np.zeros(count, np.int64), [self.session.source], [self.session.rate], own=False)

    def plan(self, start: int, count: int) -> LoadPlan:
        region = RegionDescription(self.session.source[0], BLOCK_BYTES, BLOCK_BYTES, 1000, "", "", "", "there:1")
        numbers = np.arange(count)
        read = SourceRead(region, numbers, numbers, numbers.astype(np.uint64))
        return LoadPlan(self.prefix, self.hashes[start : start + count], [read])

    def close(self, hits: int) -> None:
        if self.hits is None:
            self.hits = hits
            self.session.reported.append((len(self.hashes), hits))


@dataclass
class HeldSession:
    """Holds the keys in ``held``, in a node that gives ``rate`` bytes/s; answers to questions stay away while
    ``travelling``."""

    held: set[bytes] = field(default_factory=set)
    travelling: bool = False
    reported: list[tuple[int, int]] = field(default_factory=list)
    closed: bool = False
    source: tuple[str, str] = ("peer", "host")
    rate: float = 1e9
    patience: list[float] = field(default_factory=list)

    def ask(self, prefix: bytes, hashes: list[bytes], patience_seconds: float, fetch_seconds: float) -> HeldChain:
        self.patience.append(patience_seconds)
        return HeldChain(self, prefix, hashes)

    def local(self, prefix: bytes, hashes: list[bytes]) -> Local:
        slots = np.array([0 if prefix + block_hash in self.held else -1 for block_hash in hashes], np.int64)
        return Local(Mirror(), slots, np.zeros(len(slots), np.uint64))

    def still(self, local: Local) -> np.ndarray:
        return local.slots >= 0

    def close(self) -> None:
        self.closed = True


def request(name: str, tokens: int, text: str = "t", **changes: Any) -> Any:
    """As vLLM's `Request`: block i of equal ``text`` has equal hashes."""
    values = {
        "request_id": name, "num_tokens": tokens, "num_computed_tokens": 0, "num_preemptions": 0,
        "block_hashes": [f"{text}{i}".encode() for i in range(tokens // BLOCK_SIZE)],
        "skip_reading_prefix_cache": False, "lora_request": None, "mm_features": [], "prompt_embeds": None, "cache_salt": None,
        "kv_transfer_params": None,
    }  # fmt: skip
    return SimpleNamespace(**values | changes)


class Engine:
    """vLLM's scheduler, as far as the half sees it: hands out blocks, runs steps."""

    def __init__(self, algorithm: str = "sha256", **changes: Any) -> None:
        self.session = HeldSession()
        space = Namespace(
            weights="w", dtype="d", kv_dtype="k", block_size=BLOCK_SIZE, page_bytes=BLOCK_BYTES, layers=1, kv_heads=1,
            head_size=1, hash_algorithm=algorithm, hash_seed="", packing="p",
        )  # fmt: skip
        self.half = SchedulerHalf(self.session, space, BLOCK_BYTES, changes.pop("load_bytes_max", 100 * BLOCK_BYTES), **changes)
        self.blocks: dict[str, list[int]] = {}
        self.next_block = 1
        self.known: set[str] = set()

    def allocate(self, req: Any, tokens: int) -> list[int]:
        mine = self.blocks.setdefault(req.request_id, [])
        while len(mine) * BLOCK_SIZE < tokens:
            mine.append(self.next_block)
            self.next_block += 1
        return mine

    def admit(self, req: Any, local_tokens: int = 0) -> int | None:
        """Ask for external tokens and start a load if there are any; None and 0 as `matched` says."""
        tokens = self.half.matched(req, local_tokens)
        if tokens:
            self.half.allocated(req, self.allocate(req, local_tokens + tokens), tokens)
            req.num_computed_tokens = local_tokens + tokens
        return tokens

    def run(self, **scheduled: tuple[Any, int]) -> StepMetadata:
        """One step: name -> (request, tokens)."""
        new, cached = [], SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
        for name, (req, tokens) in scheduled.items():
            before = len(self.blocks.get(name, []))
            after = self.allocate(req, req.num_computed_tokens + tokens)
            if name in self.known:
                cached.req_ids.append(name)
                cached.new_block_ids.append((after[before:],) if len(after) > before else None)
                cached.num_computed_tokens.append(req.num_computed_tokens)
            else:
                self.known.add(name)
                self.half.allocated(req, after, 0)
                new.append(SimpleNamespace(block_ids=(after,), num_computed_tokens=req.num_computed_tokens))
        output = SimpleNamespace(
            scheduled_new_reqs=new, scheduled_cached_reqs=cached,
            num_scheduled_tokens={name: tokens for name, (_, tokens) in scheduled.items()},
            total_num_scheduled_tokens=sum(tokens for _, tokens in scheduled.values()),
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: (self.blocks[name],)),
        )  # fmt: skip
        meta = self.half.step(output)
        for req, tokens in scheduled.values():
            req.num_computed_tokens += tokens
        return meta

    def save_all(self, meta: StepMetadata) -> list[bytes]:
        saved = [key for save in meta.saves for key in save.keys]
        self.session.held.update(saved)
        return saved


def filled(engine: Engine, tokens: int = 17, **changes: Any) -> None:
    """Have a first request compute and save its blocks."""
    first = request("first", tokens, **changes)
    assert engine.admit(first) == 0
    engine.save_all(engine.run(first=(first, tokens)))
    engine.half.finished(first)


def test_a_step_with_nothing_to_do_is_one_object_in_all_processes() -> None:
    engine = Engine()
    req = request("a", 4 * BLOCK_SIZE)
    engine.admit(req)
    assert engine.run(a=(req, BLOCK_SIZE + 1)).saves, "a block is complete"
    req.num_computed_tokens = BLOCK_SIZE + 1
    step = engine.run(a=(req, 1))
    assert step is NOTHING and step == StepMetadata(forward=True)
    assert pickle.loads(pickle.dumps(step)) is NOTHING
    busy = StepMetadata(overwritten=[3])
    assert pickle.loads(pickle.dumps(busy)) == busy


def test_a_request_computes_when_nobody_holds_its_blocks() -> None:
    engine = Engine()
    assert engine.admit(request("a", 17)) == 0


def test_what_one_request_saved_the_next_one_loads() -> None:
    engine = Engine()
    filled(engine)
    assert engine.admit(request("b", 17)) == 16
    load = engine.run().loads[0]
    assert load.request_id == "b" and load.plan.hashes == [b"t0", b"t1", b"t2", b"t3"]
    assert load.block_ids == engine.blocks["b"]


def test_the_last_token_is_always_computed() -> None:
    engine = Engine()
    filled(engine)
    assert engine.admit(request("b", 16)) == 12


def test_only_blocks_behind_the_engines_own_hit_are_loaded() -> None:
    engine = Engine()
    filled(engine)
    b = request("b", 17)
    assert engine.admit(b, local_tokens=8) == 8
    load = engine.run().loads[0]
    assert load.plan.hashes == [b"t2", b"t3"] and load.block_ids == engine.blocks["b"][2:4]


def test_a_travelling_answer_is_asked_for_again() -> None:
    engine = Engine()
    filled(engine)
    engine.session.travelling = True
    b = request("b", 17)
    assert engine.admit(b) is None
    engine.session.travelling = False
    assert engine.admit(b) == 16


def test_a_request_that_must_not_read_caches_computes() -> None:
    engine = Engine()
    filled(engine)
    assert engine.admit(request("b", 17, skip_reading_prefix_cache=True)) == 0


def test_three_identical_requests_load_once() -> None:
    engine = Engine()
    filled(engine)
    b, c, d = request("b", 17), request("c", 17), request("d", 17)
    assert [engine.admit(b), engine.admit(c), engine.admit(d)] == [16, None, None]
    assert len(engine.run().loads) == 1
    engine.half.loads_ended({"b"}, set())
    # Now vLLM's own cache has them.
    assert engine.half.matched(c, 16) == 0 and engine.half.matched(d, 16) == 0
    assert engine.half.check() == []


def computing(engine: Engine, monkeypatch: pytest.MonkeyPatch, seconds: float = 1.0) -> None:
    """Have a first request compute and save blocks: 600 tokens in so many seconds, 150 blocks of 1,000 bytes."""
    clock = [0.0]
    monkeypatch.setattr("kvshare.integrations.vllm.scheduler_half.time", SimpleNamespace(monotonic=lambda: clock[0]))
    filled(engine, 601)
    clock[0] += seconds
    engine.half.step_returned()


def test_what_arrives_later_than_it_is_computed_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    computing(engine, monkeypatch)
    engine.session.rate = 100_000.0
    assert engine.admit(request("b", 401)) == 0
    engine.session.rate = 1_000_000.0
    assert engine.admit(request("b", 401)) == 400


def test_a_load_is_limited_by_what_computing_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    computing(engine, monkeypatch)
    assert engine.admit(request("b", 301)) == 300
    plan = engine.run().loads[0].plan
    assert plan.seconds == pytest.approx(300 / 601) and 0 < plan.grace_seconds < 0.1


def test_an_engine_that_has_computed_little_loads_without_a_limit_from_measured_peers() -> None:
    engine = Engine()
    filled(engine)
    engine.session.rate = 1.0
    assert engine.admit(request("b", 17)) == 16
    assert engine.run().loads[0].plan.seconds == 0
    engine.session.rate = 0.0
    assert engine.admit(request("c", 17, text="t", cache_salt="")) is None, "b loads the same blocks"
    engine.half.loads_ended({"b"}, set())
    assert engine.admit(request("d", 17)) == 0


def test_loads_under_way_make_a_source_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(load_bytes_max=1000 * BLOCK_BYTES)
    computing(engine, monkeypatch)
    filled(engine, 601, text="u")
    engine.session.rate = 300_000.0  # two requests at once would take as long as one computes
    assert engine.admit(request("b", 601)) == 600
    assert engine.admit(request("c", 601, text="u")) == 0
    engine.half.loads_ended({"b"}, set())
    assert engine.admit(request("d", 601, text="u")) == 600


def test_reads_that_turn_out_slow_make_the_next_request_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    computing(engine, monkeypatch)
    b = request("b", 401)
    assert engine.admit(b) == 400
    engine.half.reads_ended(Reads([Measured(engine.session.source, 0, 0.2, slow=True)]))
    engine.half.loads_ended({"b"}, set(engine.blocks["b"]))
    assert engine.admit(request("c", 401)) == 0


def test_a_request_waits_longer_for_a_measurement_the_longer_it_would_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    computing(engine, monkeypatch, seconds=10.0)
    engine.admit(request("b", 41))
    engine.admit(request("c", 601, text="c"))
    assert engine.session.patience[-1] > engine.session.patience[-2] > 0


def test_a_request_with_a_failed_load_computes_and_is_not_asked_again() -> None:
    engine = Engine()
    filled(engine)
    b = request("b", 17)
    engine.admit(b)
    engine.run()
    engine.half.loads_ended({"b"}, {engine.blocks["b"][0]})
    b.num_computed_tokens = 0
    assert engine.admit(b) == 0
    b.num_preemptions = 1
    assert engine.admit(b) == 0
    assert engine.admit(request("c", 17)) == 16


def test_a_failed_block_of_another_request_does_not_count() -> None:
    engine = Engine()
    filled(engine)
    b = request("b", 17)
    engine.admit(b)
    engine.half.loads_ended({"b"}, {999})
    b.num_preemptions, b.num_computed_tokens = 1, 0
    assert engine.admit(b) == 16


def test_beyond_the_limit_of_loads_a_request_loads_what_fits_and_then_computes() -> None:
    engine = Engine(load_bytes_max=6 * BLOCK_BYTES)
    for text in "tuv":
        filled(engine, text=text)
    assert engine.admit(request("b", 17, text="t")) == 16
    assert engine.admit(request("c", 17, text="u")) == 8
    assert engine.admit(request("d", 17, text="v")) == 0
    engine.half.loads_ended({"b", "c"}, set())
    assert engine.admit(request("e", 17, text="v")) == 16


def test_a_lone_load_may_be_larger_than_the_limit() -> None:
    engine = Engine(load_bytes_max=BLOCK_BYTES)
    filled(engine)
    assert engine.admit(request("b", 17)) == 16


def test_blocks_are_saved_once_each_as_chunks_complete_them() -> None:
    engine = Engine()
    a = request("a", 17)
    engine.admit(a)
    saved = []
    for tokens in (3, 4, 4, 4, 2):
        meta = engine.run(a=(a, tokens))
        saved.append([(key[-2:], block) for save in meta.saves for key, block in zip(save.keys, save.block_ids, strict=True)])
    first = engine.blocks["a"]
    assert saved == [[], [(b"t0", first[0])], [(b"t1", first[1])], [(b"t2", first[2])], [(b"t3", first[3])]]


def test_blocks_that_decoding_fills_are_saved() -> None:
    engine = Engine()
    a = request("a", 6)
    engine.admit(a)
    engine.run(a=(a, 6))
    a.num_tokens = 7
    assert engine.run(a=(a, 1)).saves == []
    a.num_tokens = 8
    a.block_hashes.append(b"t1")
    assert [key[-2:] for key in engine.run(a=(a, 1)).saves[0].keys] == [b"t1"]


def test_guessed_tokens_are_not_saved() -> None:
    """Speculation: four tokens are computed, but only those that are known have hashes."""
    engine = Engine()
    a = request("a", 5)
    engine.admit(a)
    engine.run(a=(a, 5))
    assert engine.run(a=(a, 4)).saves == []


def test_what_our_node_holds_is_not_saved_again() -> None:
    engine = Engine()
    filled(engine)
    again = request("again", 17)
    engine.half.arrived(again)
    assert engine.run(again=(again, 17)).saves == []


def pulled(engine: Engine) -> Any:
    """A request of five blocks whose first four came from a peer."""
    filled(engine)
    b = request("b", 21)
    assert engine.admit(b) == 16
    engine.run()
    engine.half.loads_ended({"b"}, set())
    engine.session.held.clear()  # our node never had them
    return b


def test_blocks_that_came_from_a_peer_are_saved_to_our_node_when_the_first_token_is_out() -> None:
    engine = Engine()
    b = pulled(engine)
    assert len(engine.save_all(engine.run(b=(b, 5)))) == 1  # what it computed
    engine.half.finished(b)
    assert len(engine.save_all(engine.run())) == 4
    assert engine.run().saves == []


def test_postponed_blocks_that_the_next_step_overwrites_are_not_saved() -> None:
    engine = Engine()
    b = pulled(engine)
    engine.run(b=(b, 5))
    taken = engine.blocks["b"][1:3]
    engine.half.finished(b)
    other = request("other", 8, text="other")
    engine.next_block = taken[0]
    meta = engine.run(other=(other, 8))
    assert set(taken) <= set(meta.overwritten)
    saved = {block_id for save in meta.saves for block_id in save.block_ids if save.keys[0].endswith((b"t0", b"t3"))}
    assert saved == {engine.blocks["b"][0], engine.blocks["b"][3]}


def test_blocks_of_the_engines_own_hit_are_not_saved_again() -> None:
    engine = Engine()
    a = request("a", 17, num_computed_tokens=8)
    engine.half.matched(a, 8)
    assert [key[-2:] for key in engine.save_all(engine.run(a=(a, 9)))] == [b"t2", b"t3"]


def test_a_step_names_every_block_that_it_may_overwrite() -> None:
    engine = Engine()
    filled(engine)
    b, c = request("b", 17), request("c", 9, text="c", num_computed_tokens=4)
    engine.admit(b)
    engine.half.matched(c, 4)
    meta = engine.run(c=(c, 5))
    assert set(meta.overwritten) == set(engine.blocks["b"]) | set(engine.blocks["c"][1:])
    c.num_tokens = 13
    assert engine.run(c=(c, 1)).overwritten == []
    assert engine.run(c=(c, 4)).overwritten == engine.blocks["c"][-1:]


def test_a_preempted_request_saves_what_it_computes_again_where_it_now_lies() -> None:
    engine = Engine()
    a = request("a", 17)
    engine.admit(a)
    engine.run(a=(a, 9))
    old = engine.blocks.pop("a")
    engine.known.discard("a")
    a.num_preemptions, a.num_computed_tokens = 1, 0
    assert engine.admit(a) == 0
    meta = engine.run(a=(a, 17))
    assert meta.saves[0].block_ids == engine.blocks["a"][:4] and not set(meta.saves[0].block_ids) & set(old)


def test_a_preempted_request_loads_what_it_saved() -> None:
    engine = Engine()
    a = request("a", 17)
    engine.admit(a)
    engine.save_all(engine.run(a=(a, 9)))
    engine.blocks.pop("a")
    a.num_preemptions, a.num_computed_tokens = 1, 0
    assert engine.admit(a) == 8


def test_an_aborted_requests_load_is_still_awaited() -> None:
    engine = Engine()
    filled(engine)
    b, c = request("b", 17), request("c", 17)
    engine.admit(b)
    engine.half.finished(b)
    assert engine.admit(c) is None
    engine.half.loads_ended({"b"}, set())
    assert engine.admit(c) == 16
    assert engine.half.check() == []


def test_lookups_and_hits_are_reported_once_per_request() -> None:
    engine = Engine()
    filled(engine)
    engine.session.reported.clear()
    b = request("b", 17)
    engine.admit(b)
    engine.half.loads_ended({"b"}, set())
    engine.run(b=(b, 1))
    engine.half.finished(b)
    assert engine.session.reported == [(4, 4)]


@pytest.mark.parametrize("other", [{"cache_salt": "tenant"}, {"cache_salt": "another"}])
def test_a_salt_never_crosses(other: dict[str, str]) -> None:
    engine = Engine()
    filled(engine, cache_salt="one")
    assert engine.admit(request("b", 17, **other)) == 0
    assert engine.admit(request("c", 17)) == 0
    assert engine.admit(request("d", 17, cache_salt="one")) == 16


def test_a_requests_tenant_is_in_its_keys_and_finds_nobody_elses() -> None:
    engine = Engine(tenant="house")
    filled(engine, kv_transfer_params={"tenant": "acme", "other": 1})
    assert {tenant_of(key) for key in engine.session.held} == {tenant_tag("acme")}
    assert engine.admit(request("b", 17)) == 0
    assert engine.admit(request("c", 17, kv_transfer_params={"tenant": "house"})) == 0
    assert engine.admit(request("d", 17, kv_transfer_params={"tenant": "acme"})) == 16


@pytest.mark.parametrize("params", [None, {}, {"tenant": None}, {"do_remote_decode": True}])
def test_a_request_that_names_no_tenant_is_the_engines(params: dict[str, object] | None) -> None:
    engine = Engine(tenant="house")
    filled(engine, kv_transfer_params=params)
    assert {tenant_of(key) for key in engine.session.held} == {tenant_tag("house")}
    nobody = Engine()
    filled(nobody)
    assert {tenant_of(key) for key in nobody.session.held} == {NO_TENANT}


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, 5, ["acme"], {"a": 1}])
def test_a_request_with_an_impossible_tenant_shares_nothing_and_that_is_said_once(
    name: object, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(tenant="house")
    for text in "tu":
        filled(engine, text=text, kv_transfer_params={"tenant": name})
    assert engine.session.held == set()
    assert len(caplog.records) == 1 and "use 1 to 64 letters" in caplog.text


def test_a_consumer_saves_nothing_and_a_producer_loads_nothing() -> None:
    consumer, producer = Engine(saves=False), Engine(loads=False)
    for engine in (consumer, producer):
        filled(engine)
    assert consumer.session.held == set() and len(producer.session.held) == 4
    assert producer.admit(request("b", 17)) == 0


def test_after_a_reset_the_engine_shares_only_with_itself() -> None:
    engine, stranger = Engine(), Engine()
    filled(engine)
    engine.half.reset()
    assert engine.admit(request("b", 17)) == 0
    filled(engine, text="n")
    stranger.session.held = engine.session.held
    assert engine.admit(request("c", 17, text="n")) == 16
    assert stranger.admit(request("d", 17, text="n")) == 0


def test_requests_that_run_across_a_reset_save_nothing_more() -> None:
    engine = Engine()
    a, waiting = request("a", 17), request("waiting", 17, text="w")
    engine.admit(a)
    engine.run(a=(a, 9))
    engine.half.arrived(waiting)
    engine.half.reset()
    meta = engine.run(a=(a, 8), waiting=(waiting, 17))
    assert [len(save.keys) for save in meta.saves] == [4]
    assert all(key[-2:-1] == b"w" for key in meta.saves[0].keys)


def test_a_load_knows_the_weights_that_it_was_begun_under() -> None:
    engine = Engine()
    filled(engine)
    engine.admit(request("b", 17))
    begun = engine.run().loads[0]
    engine.half.reset()
    assert engine.run().epoch != begun.epoch


def adapter(folder: Path, content: bytes, **changes: Any) -> Any:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(content)
    values = {"lora_name": folder.name, "lora_int_id": 1, "lora_path": str(folder), "load_inplace": False}
    return SimpleNamespace(**values | {"is_3d_lora_weight": False} | changes)


def admit_until_known(engine: Engine, req: Any) -> int | None:
    for _ in range(1000):
        tokens = engine.admit(req)
        if tokens is not None:
            return tokens
        # The adapter's files are read in another thread.
        time.sleep(0.005)
    return None


def test_adapters_share_by_their_weights_and_never_cross(tmp_path: Path) -> None:
    engine = Engine("sha256_cbor")
    one, same, other = (adapter(tmp_path / name, content) for name, content in [("a", b"1"), ("b", b"1"), ("c", b"2")])
    first = request("first", 17, lora_request=one)
    assert admit_until_known(engine, first) == 0
    engine.save_all(engine.run(first=(first, 17)))
    assert admit_until_known(engine, request("x", 17, lora_request=other)) == 0
    assert admit_until_known(engine, request("y", 17)) == 0
    assert admit_until_known(engine, request("z", 17, lora_request=same)) == 16


@pytest.mark.parametrize("changes", [{"lora_path": "/nowhere/at/all"}, {"load_inplace": True}])
def test_an_adapter_that_cannot_be_identified_is_not_shared(tmp_path: Path, changes: dict[str, Any]) -> None:
    engine = Engine("sha256_cbor")
    req = request("a", 17, lora_request=adapter(tmp_path / "a", b"1", **changes))
    assert admit_until_known(engine, req) == 0
    assert engine.run(a=(req, 17)).saves == []


@pytest.mark.parametrize("changes", [{"mm_features": ["image"]}, {"prompt_embeds": "tensor"}, {"lora_request": "adapter"}])
def test_requests_with_more_than_tokens_are_shared_only_under_hashes_that_agree(changes: dict[str, Any]) -> None:
    engine = Engine("sha256")
    a = request("a", 17, **changes)
    assert engine.admit(a) == 0
    assert engine.run(a=(a, 17)).saves == []
    if "lora_request" not in changes:
        engine = Engine("sha256_cbor")
        filled(engine, **changes)
        assert engine.admit(request("b", 17, **changes)) == 16


def test_closing_closes_the_session() -> None:
    engine = Engine()
    engine.half.close()
    assert engine.session.closed
