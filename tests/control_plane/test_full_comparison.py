"""``benchmarks/compare_all.py``: what its verdicts say of rows made up, its page, and that an interrupted matrix goes on where it was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from control_plane.simulator import compare as comparing
from control_plane.simulator.rows import Curves, Row

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import compare_all
from comparison_page import BEGIN, END, PartRows, results_text, write_page
from verdicts import Names, best_arms, cells_of, knees, verdicts_of

NAMES = Names("ours", "ours, KV events", ("clairvoyant ours", "clairvoyant other"), "fifo", "ours", 2)


def row(arm: str, seed: int = 0, *, rate: float = 1.0, workload: str = "w", goodput: float = 10.0, **changed: Any) -> Row:
    ttft_p90 = changed.pop("ttft_p90", 1000.0)
    times = {"p50": 1.0, "p90": ttft_p90, "p99": 3000.0}
    made: dict[str, Any] = {
        "trace": workload, "fleet": "f", "scheduling_policy": "fifo", "routing_strategy": arm, "rate": rate, "rate_rps": 12.0, "seed": seed,
        "requests": 100, "completed": 100, "failed": 0, "rejected": 0, "goodput_rps": goodput, "throughput_rps": 12.0,
        "slo_attainment": 0.95, "slo_attainment_by_class": {}, "ttft_ms": times, "tpot_ms": times, "e2e_ms": times, "prefix_hit_rate": 0.0,
        "lru_hit_rate": 0.0, "output_tokens_per_s": 1.0, "cost_usd": 1.0, "fairness_jain": 1.0, "wall_s": 1.0, "event_digest": "",
    }  # fmt: skip
    return Row(**(made | changed))  # type: ignore[typeddict-item]


def over_seeds(arm: str, goodputs: tuple[float, ...], **changed: Any) -> list[Row]:
    return [row(arm, seed, goodput=goodput, **changed) for seed, goodput in enumerate(goodputs)]


# ---- verdicts


def test_an_arm_that_is_better_with_every_seed_by_as_much_is_told_of() -> None:
    """Seeds differ far more than arms: only the paired difference shows it."""
    rows = over_seeds("ours", (10.0, 20.0, 30.0)) + over_seeds("theirs", (11.0, 21.1, 30.9)) + over_seeds("luck", (9.0, 30.0, 24.0))
    found = verdicts_of(cells_of(rows), NAMES)
    assert [(one.other, one.key) for one, _ in found.behind] == [("theirs", ("f", "w", 1.0))]
    assert found.behind[0][0].value.mean == pytest.approx(-1.0)
    assert found.behind[0][1] == pytest.approx(-1.0 / 21.0)
    assert found.compared == 2
    assert (found.scores["theirs"].behind, found.scores["luck"].undecided) == (1, 1)


def test_an_arm_that_is_worse_is_not_told_of_nor_is_one_that_knows_more() -> None:
    rows = over_seeds("ours", (10.0, 20.0, 30.0)) + over_seeds("worse", (9.0, 19.1, 28.9))
    rows += over_seeds("clairvoyant ours", (12.0, 22.1, 31.9)) + over_seeds("ours, KV events", (12.0, 22.1, 31.9))
    found = verdicts_of(cells_of(rows), NAMES)
    assert found.behind == []
    assert found.compared == found.scores["worse"].ahead == 1


def test_of_one_seed_nothing_is_significant() -> None:
    assert verdicts_of(cells_of([row("ours"), row("theirs", goodput=99.0)]), NAMES).behind == []


def test_only_seeds_that_both_arms_have_are_paired() -> None:
    rows = over_seeds("ours", (10.0, 20.0, 30.0)) + over_seeds("theirs", (11.0, 21.1))
    (finding, _), *_ = verdicts_of(cells_of(rows), NAMES).behind
    assert finding.value.mean == pytest.approx(-1.05)


def test_the_lead_is_over_the_best_that_is_not_ours_where_prefixes_are_shared() -> None:
    shared = {"lru_hit_rate": 0.5}
    rows = [
        row("ours", ttft_p90=800.0, **shared),
        row("prefix_aware", ttft_p90=700.0, **shared),
        row("rival:a", ttft_p90=1000.0, **shared),
        row("rival:b", ttft_p90=1200.0, **shared),
        row("ours", ttft_p90=800.0, rate=1.5, **shared),
        row("rival:a", ttft_p90=1.0, rate=1.5, **shared),
        row("ours", workload="alone"),
        row("rival:a", workload="alone", ttft_p90=1.0),
    ]
    (finding,) = verdicts_of(cells_of(rows), NAMES).lead
    assert (finding.key[1:], finding.other, finding.met) == (("w", 1.0), "rival:a", True)
    assert finding.value.mean == pytest.approx(0.2)


def test_the_knee_is_the_highest_rate_at_which_nine_of_ten_requests_meet_their_targets() -> None:
    rows = [row("ours", rate=rate, slo_attainment=share) for rate, share in ((0.5, 0.99), (0.8, 0.9), (1.0, 0.8))]
    rows += [row("ours", workload="hard", rate=rate, slo_attainment=0.5) for rate in (0.5, 0.8)]
    assert knees(cells_of(rows), "ours") == {("f", "w"): 0.8, ("f", "hard"): 0.5}


def test_round_robin_is_compared_at_the_knee() -> None:
    rows = []
    for rate, ours, theirs, share in ((0.5, 10.0, 9.0, 0.95), (0.8, 16.0, 6.0, 0.92), (1.0, 9.0, 1.0, 0.5)):
        rows += [
            row("ours", rate=rate, goodput=ours, slo_attainment=share, lru_hit_rate=0.5),
            row("round_robin", rate=rate, goodput=theirs),
        ]
    (finding,) = verdicts_of(cells_of(rows), NAMES).round_robin
    assert (finding.key[2], finding.met) == (0.8, True)
    assert finding.value.mean == pytest.approx(16 / 6)


def test_goodput_at_the_highest_rate_is_a_share_of_its_peak() -> None:
    rows = [row("ours", rate=rate, goodput=goodput) for rate, goodput in ((0.5, 5.0), (1.0, 10.0), (1.2, 9.5), (1.5, 8.5))]
    (finding,) = verdicts_of(cells_of(rows), NAMES).overload
    assert (finding.value.mean, finding.met) == (0.85, False)
    assert verdicts_of(cells_of(rows[:2]), NAMES).overload == []


def test_hits_below_the_knee_are_a_share_of_the_one_cache() -> None:
    rows = []
    for rate, share in ((0.5, 0.95), (0.8, 0.95), (1.0, 0.5)):
        rows.append(row("ours", rate=rate, prefix_hit_rate=0.47, lru_hit_rate=0.5, slo_attainment=share))
        rows.append(row("ours, KV events", rate=rate, prefix_hit_rate=0.48, lru_hit_rate=0.5))
    found = verdicts_of(cells_of(rows), NAMES)
    assert [(one.key[2], one.met, round(one.value.mean, 3)) for one in found.hits] == [(0.5, True, 0.94)]
    assert [(one.key[2], one.met, round(one.value.mean, 3)) for one in found.hits_with_events] == [(0.5, False, 0.96)]


def test_the_better_clairvoyant_counts() -> None:
    rows = [row("ours", goodput=9.4), row("clairvoyant ours", goodput=9.0), row("clairvoyant other", goodput=10.0)]
    (finding,) = verdicts_of(cells_of(rows), NAMES).clairvoyant
    assert (finding.other, finding.met) == ("clairvoyant other", False)
    assert finding.value.mean == pytest.approx(0.94)


def test_the_best_arms_are_those_nearest_to_the_best_of_each_cell_and_the_default() -> None:
    rows = [row(arm, goodput=goodput) for arm, goodput in (("a", 10.0), ("b", 9.0), ("ours", 1.0), ("x", 99.0))]
    rows += [row(arm, workload="v", goodput=goodput) for arm, goodput in (("a", 50.0), ("b", 100.0), ("ours", 1.0))]
    assert best_arms(cells_of(rows), 2, "ours", among=("a", "b", "ours")) == ["ours", "b"]


# ---- the page


def parts() -> list[PartRows]:
    rows = over_seeds("ours", (10.0, 20.0, 30.0), rate=0.8, lru_hit_rate=0.5, prefix_hit_rate=0.4, ttft_p90=1234.0)
    rows += over_seeds("rival:theirs", (11.0, 21.1, 30.9), rate=0.8, lru_hit_rate=0.5)
    rows[-1]["rejected"], rows[-1]["failed"] = 1, 1
    return [PartRows("w", "w:x=1", "all=ttft:1", "f", 12.0, 300.0, rows)]


def test_tables_show_what_the_rows_say() -> None:
    text = results_text(NAMES, parts(), {})
    assert "Simulated: 6 runs, 3 seeds, 300 s judged each" in text
    assert "Requests that were refused or failed: theirs 2." in text
    assert "| ours | 20 | 1.23 | 40.0% | 80.0% |" in text
    assert "| theirs | **21** ↑ | 1.00 | 0.0% | 0.0% |" in text
    assert "| w at 80%, f | theirs | -1 (-1.25 to -0.752) | -4.8% |" in text


def test_a_page_keeps_its_prose(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Mine\n\nsimulated\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    written = write_page(page, NAMES, parts())
    text = page.read_text()
    assert text.startswith("# Mine\n\nsimulated\n\n")
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    assert "3 seeds" in text
    assert all(path.exists() and path.name in text for path in written[1:])
    assert write_page(page, NAMES, parts())[0] == page
    assert page.read_text() == text


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Another page\n")
    with pytest.raises(ValueError, match="lacks the lines"):
        write_page(page, NAMES, parts())
    assert page.read_text() == "# Another page\n"


def test_the_page_of_the_project_has_its_marks_and_says_what_it_is() -> None:
    text = (Path(__file__).parents[2] / "docs" / "COMPARISON.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert "is simulated" in text


# ---- the matrix


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Arguments of a matrix of seconds."""
    monkeypatch.setattr(comparing, "LEAST_S", 20.0)
    monkeypatch.setattr(comparing, "TAIL_S", 2.0)
    workloads = {"poisson": compare_all.Kind("poisson:rate_rps=2,duration_s=120", compare_all.SLO, True)}
    monkeypatch.setattr(compare_all, "WORKLOADS", workloads)
    monkeypatch.setattr(compare_all.FindCapacity, "__call__", lambda self, part: (part, 8.0))
    given = "--fleets 2xh100-llama3-8b --workloads poisson --rates 0.5,1.0 --arms adaptive,round_robin,baseline --seeds 2 --jobs 1"
    folders = ["--out", str(tmp_path / "out"), "--page", str(tmp_path / "page.md")]
    return [*given.split(), "--duration-s", "20", "--clairvoyants", "load_balanced", *folders]


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ctrl-C after so many results; the keys of all that were kept."""
    kept: list[str] = []
    add = compare_all.RowsFile.add

    def counted(self: compare_all.RowsFile, key: str, row: Row, curves: Curves) -> None:
        add(self, key, row, curves)
        kept.append(key)
        if len(kept) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(compare_all.RowsFile, "add", counted)
    return kept


def test_an_interrupted_matrix_goes_on_and_has_one_seed_of_everything_first(
    small: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = stop_after(7, monkeypatch)
    assert compare_all.main(small) == 1
    assert "the same command goes on" in capsys.readouterr().err
    assert "7 runs, 1 seeds" in (tmp_path / "page.md").read_text()
    assert compare_all.main(small) == 0
    assert len(kept) == len(set(kept)) == 20  # 3 arms, one with KV events, one clairvoyant; 2 rates; 2 seeds
    assert [key.endswith(" 0]") for key in kept] == [True] * 10 + [False] * 10
    assert "20 runs, 2 seeds" in (tmp_path / "page.md").read_text()
    assert compare_all.main([*small, "--seeds", "3"]) == 0  # a seed more is added
    assert len(kept) == 30
    assert compare_all.main([*small, "--report"]) == 0
    assert "20 runs" not in (tmp_path / "page.md").read_text()
    assert len(kept) == 30


def test_all_arms_of_a_cell_have_the_same_arrivals_and_their_own_names(small: list[str], tmp_path: Path) -> None:
    assert compare_all.main([*small, "--seeds", "1", "--rates", "1.0"]) == 0
    options = compare_all.parser().parse_args([*small, "--seeds", "1", "--rates", "1.0"])
    ((_, file),) = compare_all.results_of(compare_all.matrix_of(options), tmp_path / "out").items()
    rows = file.rows()
    assert [one["routing_strategy"] for one in rows] == [
        "adaptive", "round_robin", "baseline", "adaptive, KV events", "clairvoyant load_balanced",
    ]  # fmt: skip
    assert len({one["requests"] for one in rows}) == 1
    assert [one["scheduling_policy"] for one in rows] == ["adaptive", "adaptive", "fifo", "adaptive", "adaptive"]
    assert file.capacity_rps == 8.0


def test_a_page_has_the_arms_in_their_order_whoever_was_done_first(small: list[str], tmp_path: Path) -> None:
    assert compare_all.main([*small, "--seeds", "1", "--rates", "1.0", "--arms", "baseline"]) == 0
    assert compare_all.main([*small, "--seeds", "1", "--rates", "1.0"]) == 0
    lines = (tmp_path / "page.md").read_text().splitlines()
    table = lines[lines.index("#### poisson") :]
    arms = [line.split(" | ")[0].removeprefix("| ") for line in table if line.startswith("| ")][1:]
    assert arms == ["adaptive", "round_robin", "baseline", "adaptive, KV events", "clairvoyant load_balanced"]


def test_kv_events_are_for_workloads_that_share_beginnings() -> None:
    matrix = compare_all.matrix_of(compare_all.parser().parse_args(["--kv-events", "adaptive,rival:dynamo"]))
    for part in matrix.parts:
        names = [arm.router_name for arm in matrix.arms(part)]
        events = [name for name in names if "KV events" in name]
        assert events == (["adaptive, KV events", "rival:dynamo, KV events"] if compare_all.WORKLOADS[part.workload].shares else [])
        assert len(names) == len(set(names))


def test_results_of_other_sources_are_not_gone_on_with(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_all.main([*small, "--seeds", "1"]) == 0
    monkeypatch.setattr(compare_all, "sources_digest", lambda: "another")
    assert compare_all.main(small) == 1
    assert "was begun with sources" in capsys.readouterr().err
    assert compare_all.main([*small, "--despite-changes"]) == 0


def test_the_large_fleet_gets_the_best_arms_of_the_small_ones(small: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compare_all, "EQUAL", "2xh100-llama3-8b")
    monkeypatch.setattr(compare_all, "LARGE", "4xh100-llama3-8b")
    monkeypatch.setattr(compare_all, "LARGE_FACTOR", 2.0)
    monkeypatch.setattr(compare_all, "LARGE_WORKLOADS", ("poisson",))
    monkeypatch.setattr(compare_all, "LARGE_RATES", ("0.8",))
    monkeypatch.setattr(compare_all, "LARGE_ARMS", 2)
    given = [*small, "--seeds", "1"]
    assert compare_all.main(given) == 0
    results = compare_all.results_of(compare_all.matrix_of(compare_all.parser().parse_args(given)), tmp_path / "out")
    of = {part.fleet: file for part, file in results.items()}
    assert of["4xh100-llama3-8b"].capacity_rps == 16.0
    arms = [one["routing_strategy"] for one in of["4xh100-llama3-8b"].rows()]
    assert len(arms) == 2
    assert "adaptive" in arms


def test_a_page_that_cannot_be_written_is_told_of_before_anything_runs(
    small: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = stop_after(99, monkeypatch)
    (tmp_path / "page.md").write_text("# Another page\n")
    assert compare_all.main(small) == 1
    assert "lacks the lines" in capsys.readouterr().err
    assert kept == []


def test_a_folder_of_another_comparison_is_refused_and_left_alone(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*small, "--seeds", "1", "--rates", "0.5"]
    assert compare_all.main(given) == 0
    page = (tmp_path / "page.md").read_text()
    assert compare_all.main([*given, "--half", "1"]) == 1
    assert "was begun with half 2, and this is 1" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == page


def test_sources_are_told_apart_by_their_content() -> None:
    assert compare_all.sources_digest() == compare_all.sources_digest() != ""
