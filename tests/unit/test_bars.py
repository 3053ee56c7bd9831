"""The runner of benchmarks: one line per bar, results kept with what they depend on, failures told and never counted as ok."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_bars() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bars", ROOT / "benchmarks" / "bars.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bars"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bars = load_bars()

SCRIPT = """
import json, pathlib, sys
here = pathlib.Path(__file__)
runs = here.with_suffix(".runs")
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
out = pathlib.Path(sys.argv[sys.argv.index("--json") + 1])
out.write_text(json.dumps({"figures": {"fast": {"value": 0.9, "unit": "ratio"}, "slow": {"value": 1.26, "unit": "ms"}},
                           "detail": {"runs": [1, 2]}}))
print("chatter that is no line of ours")
"""
FAST = bars.Bar("fast", "bench_good.py", ">=", 0.8, "ratio", 2)
SLOW = bars.Bar("slow", "bench_good.py", "<=", 1.25, "ms", 3)
ABSENT = bars.Bar("absent", "bench_good.py", "<=", 1.0, "ms", 3)
BROKEN = bars.Bar("broken", "bench_bad.py", "<=", 1.0, "ms", 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bench_good.py").write_text(SCRIPT)
    (tmp_path / "bench_bad.py").write_text("raise SystemExit('the disk is on fire')")
    return tmp_path


def test_one_line_per_bar_and_one_run_per_script(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = bars.main([], [FAST, SLOW, ABSENT], folder)
    assert capsys.readouterr().out.splitlines() == ["ok fast 0.9 0.8 ratio", "short slow 1.26 1.25 ms", "short absent nan 1 ms"]
    assert code == 1
    assert (folder / "bench_good.runs").read_text() == "x"


def test_all_ok_is_exit_code_zero(folder: Path) -> None:
    assert bars.main([], [FAST], folder) == 0


def test_results_name_commit_machine_command_and_date(folder: Path) -> None:
    bars.main([], [FAST], folder)
    kept = json.loads((folder / "results" / "bench_good.json").read_text())
    assert {"commit", "dirty", "date", "machine", "command", "figures", "detail"} == set(kept)
    assert kept["figures"]["fast"] == {"value": 0.9, "unit": "ratio"} and kept["detail"] == {"runs": [1, 2]}
    assert kept["machine"]["cores"] >= 1 and kept["machine"]["python"].startswith("3.")


def test_a_script_that_fails_is_short_its_reason_is_told_and_old_results_stay(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "results").mkdir()
    (folder / "results" / "bench_bad.json").write_text("old")
    assert bars.main([], [BROKEN, FAST], folder) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == ["short broken nan 1 ms", "ok fast 0.9 0.8 ratio"]
    assert "the disk is on fire" in said.err
    assert (folder / "results" / "bench_bad.json").read_text() == "old"


def test_only_and_issue_narrow_what_is_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bars.main(["--only", "fast"], [FAST, SLOW, BROKEN], folder) == 0
    assert bars.main(["--issue", "3"], [FAST, SLOW, BROKEN], folder) == 1
    assert capsys.readouterr().out.splitlines() == ["ok fast 0.9 0.8 ratio", "short slow 1.26 1.25 ms"]


def test_an_unknown_bar_is_named_with_the_nearest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bars.main(["--only", "fsat"], [FAST], folder) == 2
    assert "unknown bar 'fsat': did you mean 'fast'?" in capsys.readouterr().err
    assert bars.main(["--issue", "9"], [FAST], folder) == 2


@pytest.mark.parametrize(("value", "ok"), [(0.8, True), (0.79999, False), (float("nan"), False), (float("inf"), False)])
def test_a_limit_itself_is_ok_and_what_is_no_number_never_is(value: float, ok: bool) -> None:
    assert FAST.holds(value) is ok


def test_a_changed_tree_is_dirty_but_kept_results_do_not_count(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    result = tmp_path / "benchmarks" / "results" / "x.json"
    result.parent.mkdir(parents=True)
    result.write_text("1")
    (tmp_path / "code.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "m")
    result.write_text("2")
    assert bars.commit(tmp_path)[1] is False
    (tmp_path / "code.py").write_text("2")
    assert bars.commit(tmp_path)[1] is True


def test_every_registered_bar_has_a_name_of_its_own_and_its_script() -> None:
    names = [bar.name for bar in bars.BARS]
    assert len(names) == len(set(names))
    missing = {bar.script for bar in bars.BARS if not (ROOT / "benchmarks" / bar.script).exists()}
    assert not missing


def test_the_readme_lists_every_bar_with_its_limit() -> None:
    readme = (ROOT / "README.md").read_text()
    for bar in bars.BARS:
        assert f"| `{bar.name}` | {bar.direction} {bar.limit:g} {bar.unit} |" in readme


def test_a_script_that_cannot_measure_here_is_skipped_with_its_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bench_gpu.py").write_text("import sys\nprint('needs a GPU', file=sys.stderr)\nsys.exit(77)")
    assert bars.main([], [bars.Bar("gpu", "bench_gpu.py", ">=", 0.85, "ratio", 3), FAST], folder) == 0
    assert capsys.readouterr().out.splitlines() == ["skip gpu needs a GPU", "ok fast 0.9 0.8 ratio"]
    assert not (folder / "results" / "bench_gpu.json").exists()
