"""The router picks who answers soonest.

Goal: overlap, pulls, queues and rates weigh as they cost; a hot prefix does not pile up on who holds it; what is told corrects
what was guessed; nothing that a caller does makes the books wrong. Method: the router as it is, time by hand.
"""

from __future__ import annotations

import random

import pytest

from kvshare.overlap import Held
from kvshare.routing import Choice, Costs, Replica, Router

BLOCK = 16
TOKENS = 16_001  # a thousand blocks and a token that is always computed
COSTS = Costs(BLOCK, 1 << 20, prefill_rate=10_000.0, host_rate=10e9, peer_rate=2e9, disk_rate=4e9)
COMPUTED = TOKENS / 10_000.0
EIGHT = [Replica(f"r{i}", f"n{i}", (f"n{i}/engine",)) for i in range(8)]


def router(replicas: list[Replica] = EIGHT, costs: Costs = COSTS) -> Router:
    made = Router(costs, seed=1)
    made.update(replicas)
    return made


def send(made: Router, name: str, overlap: dict[str, Held] | None, now: float, tokens: int = TOKENS) -> Choice:
    choice = made.rank(tokens, overlap, now)[0]
    made.routed(name, choice, tokens, now)
    return choice


def test_the_engine_that_has_the_prompt_is_chosen_and_only_the_last_token_is_computed() -> None:
    choice = router().rank(TOKENS, {"n3/engine": Held(1000)}, 0.0)[0]
    assert (choice.replica, choice.held, choice.near, choice.far, choice.blocks) == ("r3", 1000, 0, 0, 1000)
    assert choice.seconds == pytest.approx(1 / 10_000.0)


def test_overlap_counts_no_further_than_the_block_before_the_last_token() -> None:
    choice = router().rank(32, {"n3/engine": Held(2)}, 0.0)[0]
    assert (choice.blocks, choice.held, choice.computing) == (1, 1, pytest.approx(16 / 10_000.0))


def test_own_cache_comes_before_own_memory_before_own_disk_before_another_host() -> None:
    overlap = {"n1/engine": Held(1000), "n2": Held(1000), "n3": Held(1000, on_disk=1000)}
    ranked = router().rank(TOKENS, overlap, 0.0)
    assert [choice.replica for choice in ranked[:3]] == ["r1", "r2", "r3"]
    assert [(choice.held, choice.near, choice.far) for choice in ranked[:3]] == [(1000, 0, 0), (0, 1000, 0), (0, 1000, 0)]
    assert ranked[1].seconds < ranked[2].seconds
    elsewhere = next(choice for choice in ranked if choice.replica == "r5")
    assert (elsewhere.far, elsewhere.source) == (1000, "n1/engine")
    assert elsewhere.seconds == pytest.approx(0.002 + 1000 * (1 << 20) / 2e9 + 1 / 10_000.0)


def test_what_would_take_longer_to_pull_than_to_compute_is_computed() -> None:
    slow = router(costs=Costs(BLOCK, 1 << 20, 10_000.0, peer_rate=1e8))
    choice = next(choice for choice in slow.rank(TOKENS, {"n0": Held(1000)}, 0.0) if choice.replica == "r5")
    assert choice.far == 0 and choice.source == ""
    assert choice.seconds == pytest.approx(COMPUTED)


def test_blocks_of_two_hosts_are_pulled_together_and_the_slower_one_decides() -> None:
    choice = next(
        choice for choice in router().rank(TOKENS, {"n5": Held(400), "n0": Held(1000)}, 0.0) if choice.replica == "r5"
    )
    assert (choice.near, choice.far) == (400, 600)
    assert choice.seconds == pytest.approx(0.002 + 600 * (1 << 20) / 2e9 + 1 / 10_000.0)


def test_a_hot_prefix_does_not_pile_up_on_its_holder() -> None:
    """Everybody asks for a tenth that n0 has, at once: the holder gets its queue's worth, the others theirs."""
    made = router()
    overlap = {"n0/engine": Held(100)}
    chosen = [send(made, str(i), overlap, 0.0).replica for i in range(80)]
    assert chosen[0] == "r0"
    counts = {replica.name: chosen.count(replica.name) for replica in EIGHT}
    assert counts["r0"] == max(counts.values()) and min(counts.values()) >= 8
    assert made.check() == []


def test_what_is_new_everywhere_is_spread_over_idle_replicas() -> None:
    made = router()
    chosen = []
    for i in range(16):
        chosen.append(send(made, str(i), {}, 100.0 * i).replica)
        made.finished(str(i), 100.0 * i + 50)
    assert sorted(chosen) == sorted(2 * [replica.name for replica in EIGHT])


def test_in_flight_requests_count_at_once_and_wear_off_at_the_rate_of_the_replica() -> None:
    made = router([EIGHT[0]])
    send(made, "a", {}, 0.0)
    assert made.rank(TOKENS, {}, 0.0)[0].waiting == pytest.approx(COMPUTED)
    assert made.rank(TOKENS, {}, 1.0)[0].waiting == pytest.approx(COMPUTED - 1.0)
    assert made.rank(TOKENS, {}, 60.0)[0].waiting == 0.0


def test_first_tokens_correct_the_queue_and_teach_the_rate() -> None:
    made = router([EIGHT[0]])
    for name in ("a", "b", "c"):
        send(made, name, {}, 0.0)
    made.first_token("a", 0.4)  # four times as fast as assumed
    assert made.rank(TOKENS, {}, 0.4)[0].waiting == pytest.approx(2 * COMPUTED)
    assert made.rank(TOKENS, {}, 0.4)[0].computing == pytest.approx(0.4, rel=0.01)
    made.first_token("b", 0.8)
    made.first_token("c", 1.2)
    assert made.rank(TOKENS, {}, 1.2)[0].seconds == pytest.approx(0.4, rel=0.01)
    assert made.check() == []


def test_who_is_late_with_a_first_token_is_avoided_the_more_the_later_it_is() -> None:
    made = router(EIGHT[:2])
    made.routed("a", next(choice for choice in made.rank(TOKENS, {}, 0.0) if choice.replica == "r0"), TOKENS, 0.0)
    made.first_token("a", COMPUTED)
    made.routed("b", next(choice for choice in made.rank(TOKENS, {}, 10.0) if choice.replica == "r0"), TOKENS, 10.0)
    waiting = {
        now: {choice.replica: choice.waiting for choice in made.rank(TOKENS, {}, now)} for now in (10.0 + COMPUTED, 20.0, 40.0)
    }
    assert [by_name["r1"] for by_name in waiting.values()] == [0.0, 0.0, 0.0]
    assert 0.0 <= waiting[10.0 + COMPUTED]["r0"] < waiting[20.0]["r0"] < waiting[40.0]["r0"]
    made.finished("b", 40.0)
    assert {choice.waiting for choice in made.rank(TOKENS, {}, 40.0)} == {0.0}


def test_a_request_that_is_routed_again_moves() -> None:
    made = router(EIGHT[:2])
    first = send(made, "a", {}, 0.0)
    other = next(choice for choice in made.rank(TOKENS, {}, 0.0) if choice.replica != first.replica)
    made.routed("a", other, TOKENS, 0.0)
    waiting = {choice.replica: choice.waiting for choice in made.rank(TOKENS, {}, 0.0)}
    assert waiting == {first.replica: 0.0, other.replica: pytest.approx(COMPUTED)}
    assert made.check() == []


def test_requests_of_other_routers_count_as_ours_do() -> None:
    made = router(EIGHT[:3])
    chosen = send(made, "a", {}, 0.0).replica
    others = [replica.name for replica in EIGHT[:3] if replica.name != chosen]
    made.told(others[0], running=2)
    made.told(chosen, running=1)
    waiting = {choice.replica: choice.waiting for choice in made.rank(TOKENS, {}, 0.0)}
    assert waiting == {chosen: pytest.approx(COMPUTED), others[0]: pytest.approx(2 * COMPUTED), others[1]: 0.0}


def test_each_data_parallel_rank_has_a_queue_and_a_cache_of_its_own() -> None:
    made = router([Replica("r", "n", ("n/engine-0", "n/engine-1"))])
    assert send(made, "a", {"n/engine-1": Held(1000)}, 0.0).rank == 1
    ranked = made.rank(TOKENS, {}, 0.0)
    assert {(choice.replica, choice.rank) for choice in ranked} == {("r", 0), ("r", 1)}
    # The neighbour's cache is read on the same host.
    made = router([Replica("r", "n", ("n/engine-0", "n/engine-1"))])
    other = next(choice for choice in made.rank(TOKENS, {"n/engine-1": Held(1000)}, 0.0) if choice.rank == 0)
    assert (other.held, other.near, other.far) == (0, 1000, 0)


def test_measured_rates_replace_the_assumed_ones_as_long_as_they_are_fresh() -> None:
    made = router(EIGHT[:2])

    def pulling(now: float) -> float:
        return next(choice for choice in made.rank(TOKENS, {"n0": Held(1000)}, now) if choice.replica == "r1").seconds

    made.measured("n0", "host", 10**9, 0.102, 0.0)
    assert pulling(0.0) == pytest.approx(0.002 + 1000 * (1 << 20) / 1e10 + 1e-4, rel=0.01)
    assert pulling(1000.0) == pytest.approx(0.002 + 1000 * (1 << 20) / 2e9 + 1e-4)


def test_pulls_from_one_source_queue_behind_each_other() -> None:
    made = router()
    overlap = {"n0": Held(1000)}
    pulled = next(choice for choice in made.rank(TOKENS, overlap, 0.0) if choice.replica == "r1")
    made.routed("a", pulled, TOKENS, 0.0)
    again = next(choice for choice in made.rank(TOKENS, overlap, 0.0) if choice.replica == "r2")
    assert again.seconds == pytest.approx(pulled.seconds + 1000 * (1 << 20) / 2e9)


def test_without_an_answer_two_are_drawn_and_the_less_loaded_is_first() -> None:
    made = router()
    for i in range(400):
        ranked = made.rank(TOKENS, None, 0.0)
        assert len(ranked) == 2 and ranked[0].seconds <= ranked[1].seconds
        assert ranked[0].replica != ranked[1].replica
        made.routed(str(i), ranked[0], TOKENS, 0.0)
    loads = [made.rank(TOKENS, {}, 0.0, {replica.name})[0].waiting / COMPUTED for replica in EIGHT]
    assert max(loads) - min(loads) <= 6  # as two choices do it; one choice would be off by some 20


def test_only_those_that_may_be_chosen_are_ranked_and_nobody_is_no_failure() -> None:
    made = router()
    assert {choice.replica for choice in made.rank(TOKENS, {}, 0.0, {"r1", "r2", "gone"})} == {"r1", "r2"}
    assert made.rank(TOKENS, {}, 0.0, set()) == [] and made.rank(TOKENS, None, 0.0, set()) == []
    assert router([]).rank(TOKENS, {}, 0.0) == []


def test_replicas_come_and_go_and_what_is_known_of_the_others_stays() -> None:
    made = router(EIGHT[:2])
    names = {str(i): send(made, str(i), {}, 0.0).replica for i in range(2)}
    assert set(names.values()) == {"r0", "r1"}
    made.update([EIGHT[1], EIGHT[2]])
    assert made.check() == []
    assert {choice.replica: choice.waiting for choice in made.rank(TOKENS, {}, 0.0)} == {
        "r1": pytest.approx(COMPUTED),
        "r2": 0.0,
    }
    for name in names:
        made.first_token(name, 1.0)
        made.finished(name, 1.0)
    assert made.check() == []


@pytest.mark.parametrize("seed", range(10))
def test_the_books_stay_right_whatever_is_told_in_whatever_order(seed: int) -> None:
    """Events of unknown requests and replicas, twice, out of order, with clocks that stand still."""
    rng = random.Random(seed)
    made = router()
    for step in range(500):
        now, name = step / 10, str(rng.randrange(60))
        match rng.randrange(7):
            case 0 | 1:
                overlap = {f"n{rng.randrange(9)}": Held(rng.randrange(1, 1100), rng.randrange(3)) for _ in range(3)}
                ranked = made.rank(rng.randrange(0, 20_000), rng.choice([overlap, None]), now)
                if ranked:
                    made.routed(name, rng.choice(ranked), TOKENS, now)
            case 2 | 3:
                made.first_token(name, now)
            case 4:
                made.finished(name, now)
            case 5:
                made.told(f"r{rng.randrange(9)}", rng.randrange(5), rng.randrange(2))
                made.computed(f"r{rng.randrange(9)}", rng.randrange(10_000), rng.choice([0.0, 0.1, float("inf")]))
                made.measured(f"n{rng.randrange(9)}", "host", rng.randrange(10**9), rng.random(), now, rng.random() < 0.5)
            case 6:
                made.update(rng.sample(EIGHT, rng.randrange(9)))
        assert made.check() == []
    assert all(0 <= choice.waiting <= choice.seconds < 1e6 for choice in made.rank(TOKENS, {}, 100.0))
