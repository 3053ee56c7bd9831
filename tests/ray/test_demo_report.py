"""Goal: the demo's figures mean what they say, and it calls itself a success only when it is one. Method: invented runs.

The demo itself, with real engines, runs by `make demo`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kvshare.integrations.demo.report import Comparison, Report, Served, compare, draw, median_first, table, to_json, write_json

PROMISED = {  # keys of demo.json that users' scripts rely on
    "ttft_recompute_s", "ttft_prefix_hit_s", "ttft_warm_join_s", "tokens_equal", "logprob_max_abs_diff", "blocks_wanted",
    "blocks_hit", "bytes_pulled", "survived_kill", "donors", "seconds", "machine", "commit", "left_behind", "ttft_from_zero_s",
    "zero_blocks_wanted", "zero_blocks_hit",
}  # fmt: skip
GOOD = Report(
    model="tiny", prompts=18, prefixes=4, prefix_tokens=3968, ttft_recompute_s=3.5, ttft_prefix_hit_s=0.06,
    ttft_warm_join_s=0.07, ttft_peer_s=0.1, tokens_equal=True, logprob_max_abs_diff=4e-5, logprob_max_abs_diff_own=3e-5,
    outputs_compared=18, outputs_equal=18,
    outputs_rounded=0, blocks_wanted=124, blocks_hit=124, warm_blocks_wanted=124, blocks_pulled=124, bytes_pulled=248 << 20,
    donors={"host A": 124}, warm_s=0.5, survived_kill=True, kill_requests=7, kill_before=2, kill_equal=7,
    kill_logprob_max_abs_diff=5e-5,
    kill_longest_first_token_s=3.6, kill_said=["a peer is gone"], ttft_from_zero_s=0.125, zero_first_s=0.2, zero_outputs=4,
    zero_equal=4, zero_logprob_max_abs_diff=5e-5, zero_blocks_wanted=124, zero_blocks_hit=124, left_behind=[],
    seconds={"cluster": 8.0}, machine={"cores": 2, "device": "cpu"}, commit="abc",
)  # fmt: skip


def served(*token_ids: int, logprob: float = -1.0, first: float = 0.1) -> Served:
    return Served(token_ids, (logprob,) * len(token_ids), first, first + 0.1, 0)


def but(**changes: Any) -> Report:
    return dataclasses.replace(GOOD, **changes)


def test_equal_outputs_count_as_equal_and_their_logprobs_are_compared() -> None:
    found = compare({"p": [served(1, 2, logprob=-1.0)]}, {"p": served(1, 2, logprob=-1.25)})
    assert found == Comparison(compared=1, equal=1, logprob_difference=0.25)
    assert found.all_equal


def test_one_wrong_token_is_a_difference() -> None:
    found = compare({"p": [served(1, 2, 3)], "q": [served(4)]}, {"p": served(1, 9, 3), "q": served(4)})
    assert (found.compared, found.equal) == (2, 1)
    assert not found.all_equal


def test_a_shorter_output_is_a_difference() -> None:
    assert not compare({"p": [served(1, 2)]}, {"p": served(1)}).all_equal


def test_logprobs_are_compared_only_up_to_where_tokens_part() -> None:
    reference = Served((1, 2, 3), (-1.0, -1.0, -1.0), 0.1, 0.2, 0)
    output = Served((1, 9, 3), (-1.5, -8.0, -9.0), 0.1, 0.2, 0)
    assert compare({"p": [reference]}, {"p": output}).logprob_difference == 0.5


def test_where_the_engine_itself_rounds_both_ways_either_output_is_right_and_it_is_told() -> None:
    recomputed, from_prefix = served(1, 2), served(1, 3)
    found = compare({"p": [recomputed, from_prefix]}, {"p": served(1, 3)})
    assert found.all_equal
    assert found.rounding == 1


def test_the_difference_is_taken_from_the_recomputed_output_and_the_engines_own_is_told_beside_it() -> None:
    ways = [served(1, logprob=-1.0), served(1, logprob=-1.5)]
    found = compare({"p": ways}, {"p": served(1, logprob=-1.25)})
    assert (found.logprob_difference, found.own_difference, found.rounding) == (0.25, 0.5, 0)


def test_nothing_compared_proves_nothing() -> None:
    assert not compare({}, {}).all_equal


def test_a_prompt_without_a_reference_is_a_mistake_not_a_success() -> None:
    with pytest.raises(KeyError):
        compare({}, {"p": served(1)})


def test_median_of_first_tokens() -> None:
    assert median_first([served(1, first=0.3), served(1, first=0.1), served(1, first=9.0)]) == 0.3


def test_a_good_run_has_no_shortfall() -> None:
    assert GOOD.shortfalls == []
    assert "It works." in table(GOOD)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"tokens_equal": False, "outputs_equal": 17}, "1 of 18 outputs differ"),
        ({"survived_kill": False, "kill_equal": 6}, "6 of 7"),
        ({"ttft_warm_join_s": 3.6}, "no faster"),
        ({"blocks_hit": 100}, "100 of 124"),
        ({"zero_equal": 3}, "only 3 of 4 requests"),
        ({"zero_outputs": 0, "zero_equal": 0}, "only 0 of 0 requests"),
        ({"zero_blocks_hit": 31}, "31 of 124 blocks came from disk"),
        ({"ttft_from_zero_s": 3.5}, "no sooner"),
        ({"left_behind": ["process 7 (raylet)"]}, "process 7 (raylet)"),
    ],
)
def test_each_broken_promise_is_a_shortfall_that_the_table_tells(changes: dict[str, Any], word: str) -> None:
    report = but(**changes)
    assert len(report.shortfalls) == 1
    assert word in report.shortfalls[0]
    assert "SHORT" in table(report)
    assert "It works." not in table(report)


def test_the_table_names_times_blocks_donors_and_the_kill() -> None:
    text = table(GOOD)
    for phrase in ("3.500 s", "50 x sooner", "124 of 124", "248 MiB", "124 from host A", "18 of 18", "7 of 7", "nothing"):
        assert phrase in text


def test_the_table_names_what_came_from_disk_after_scale_to_zero() -> None:
    text = table(but(zero_blocks_hit=93))
    for phrase in ("28 x sooner", "93 of 124 blocks from disk", "4 of 4 answered right"):
        assert phrase in text


def test_a_joiner_that_pulled_nothing_says_so() -> None:
    assert "from nobody" in table(but(donors={}, blocks_pulled=0, bytes_pulled=0))


def test_without_requests_to_the_peer_there_is_no_bar_for_it() -> None:
    assert len(but(ttft_peer_s=None).bars()) == len(GOOD.bars()) - 1


def test_json_holds_what_is_promised_and_names_the_shortfalls(tmp_path: Path) -> None:
    write_json(but(left_behind=["file /x"]), tmp_path / "made" / "demo.json")
    figures = json.loads((tmp_path / "made" / "demo.json").read_text())
    assert figures.keys() >= PROMISED
    assert figures["shortfalls"] == ["left behind: file /x"]
    assert json.loads(to_json(GOOD))["ttft_warm_join_s"] == 0.07


def test_the_picture_is_a_png_large_enough_to_read(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    draw(GOOD, tmp_path / "demo.png")
    content = (tmp_path / "demo.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") >= 1200  # the header's width in pixels
