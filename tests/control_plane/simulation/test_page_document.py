"""The page of a comparison, as a text: what it carries, what it refers to, how large it is. How it looks: test_page_in_a_browser.py."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from comparison_document import HOSTILE, METRICS, hostile_document, large_document, small_document
from hypothesis import given
from hypothesis import strategies as st

from control_plane.simulator.page import page_of
from control_plane.simulator.page_data import BARS, HEAT_MOMENTS, HEAT_ROWS, evenly, page_data, peaks


class Parsed(HTMLParser):
    """Elements with their attributes, and the texts of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self._in = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self.texts:
            self._in = tag
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = "" if tag == self._in else self._in

    def handle_data(self, data: str) -> None:
        if self._in:
            self.texts[self._in][-1] += data

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script reads."""
        found: dict[str, Any] = json.loads(self.texts["script"][1])
        return found

    @property
    def policy(self) -> str:
        return next(str(found["content"]) for tag, found in self.elements if found.get("http-equiv") == "Content-Security-Policy")


@pytest.fixture(scope="module")
def small() -> Parsed:
    return Parsed(page_of(small_document()))


def test_nothing_is_fetched(small: Parsed) -> None:
    led_to = [value for _, found in small.elements for name, value in found.items() if name in ("src", "href", "srcset", "action", "data")]
    assert led_to == ["data:,", "#result"]
    assert [found for found in small.texts["style"] if re.search(r"url\(|@import|image-set", found)] == []
    assert small.policy.startswith("default-src 'none';")
    assert "unsafe" not in small.policy
    assert "http" not in small.policy


def test_only_its_own_scripts_and_styles_may_run(small: Parsed) -> None:
    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    library, _, script = small.texts["script"]
    assert f"script-src {digest(library)} {digest(script)};" in small.policy
    assert f"style-src {digest(small.texts['style'][0])};" in small.policy
    assert not any(name.startswith("on") or name == "style" for _, found in small.elements for name in found)


def test_the_licence_of_what_it_carries_is_in_it() -> None:
    page = page_of(small_document())
    assert "Copyright (c) 2022 Leon Sorokin" in page
    assert "uPlot 1.6.32" in page
    assert "(v1.6.32)" in page  # the library says so itself


def test_the_figures_arrive_as_they_were(small: Parsed) -> None:
    document, data = small_document(), small.data
    assert data["arms"] == ["adaptive + load_balanced", "fifo + round_robin"]
    assert data["rates"] == [{"label": "0.5", "rps": 6.0}, {"label": "1.2", "rps": pytest.approx(14.4)}]
    for line, shown in zip(document["summary"], data["summary"], strict=True):
        assert {name: shown[name] for name in METRICS} == {name: line[name] for name in METRICS}
        assert shown.get("against_first") == line.get("against_first")
        assert data["rates"][shown["rate"]]["label"] == line["rate"]
        assert data["arms"][shown["arm"]] == f"{line['scheduling_policy']} + {line['routing_strategy']}"
    assert [run["event_digest"] for run in data["runs"]] == [run["event_digest"] for run in document["runs"]]
    assert data["command"] == "control-plane compare --trace 'made up' --fleet 3xh100-llama3-8b --html 'my page.html'"
    assert data["simulated"] is True
    assert [one["name"] for one in data["classes"]] == ["interactive", "batch"]
    assert data["thinned"] == {"timeline": [], "placement": [], "runs": []}


def test_curves_of_few_runs_are_whole(small: Parsed) -> None:
    document = small_document()
    first = document["curves"][0]["curves"]
    shown = next(one for one in small.data["timelines"] if (one["arm"], one["rate"]) == (0, 0))
    assert shown["seed"] == 0
    assert {name: shown[name] for name in ("queued", "running", "waiting")} == {
        name: first["timeline"][name] for name in ("queued", "running", "waiting")
    }
    assert shown["running_total"] == [sum(moment) for moment in zip(*first["timeline"]["running"], strict=True)]
    placed = next(one for one in small.data["placements"] if (one["arm"], one["rate"]) == (0, 0))
    assert placed["requests"] == first["placement"]["requests"]
    assert placed["means"]["requests"] == pytest.approx(sum(placed["requests"]) / 3, rel=1e-3)


def test_quantiles_are_means_over_seeds_within_their_spread(small: Parsed) -> None:
    of_both_seeds = [
        line["curves"] for line in small_document()["curves"] if (line["routing_strategy"], line["rate"]) == ("round_robin", "1.2")
    ]
    both = [curves["cdf"]["ttft"] for curves in of_both_seeds]
    shown = next(one for one in small.data["cdfs"] if (one["arm"], one["rate"]) == (1, 1))
    assert shown["seeds"] == 2
    assert shown["ttft"]["mean"] == pytest.approx([sum(pair) / 2 for pair in zip(*both, strict=True)], rel=1e-3)
    assert shown["ttft"]["low"] == pytest.approx([min(pair) for pair in zip(*both, strict=True)], rel=1e-3)
    assert shown["ttft"]["high"] == pytest.approx([max(pair) for pair in zip(*both, strict=True)], rel=1e-3)


def test_names_are_text_whatever_they_say() -> None:
    document = hostile_document()
    parsed, plain = Parsed(page_of(document)), Parsed(page_of(small_document()))
    assert [tag for tag, _ in parsed.elements] == [tag for tag, _ in plain.elements]
    assert parsed.data["arms"][0] == f"{HOSTILE} + {HOSTILE}"
    assert parsed.data["workload"]["name"] == HOSTILE
    assert HOSTILE in parsed.data["command"].replace("'\"'\"'", "'")
    assert parsed.texts["title"][0].startswith(HOSTILE)


def test_a_large_comparison_stays_a_small_page() -> None:
    document = large_document()
    page = page_of(document)
    assert len(page) < 3_000_000
    data = Parsed(page).data
    assert len(data["timelines"]) == len(data["placements"]) == 8 * 4
    for one in data["timelines"]:
        assert len(one["running"]) <= HEAT_ROWS
        assert len(one["at_s"]) == len(one["queued"]) == len(one["running"][0]) <= HEAT_MOMENTS
    assert all(len(one["requests"]) <= BARS for one in data["placements"])
    assert data["thinned"]["timeline"] == [
        "Each moment stands for 2 samples and shows the largest of each value.",
        f"{HEAT_ROWS} of 1,000 instances are shown, evenly spaced in the order of their mean load: "
        "the busiest of all on top, the idlest at the foot.",
    ]
    assert data["thinned"]["placement"] == [
        f"{BARS} of 1,000 instances of each arm have a bar, evenly spaced from the one with most requests to the one with fewest."
    ]
    assert_the_extremes_are_kept(document, data)


def assert_the_extremes_are_kept(document: dict[str, Any], data: dict[str, Any]) -> None:
    curves = document["curves"][0]["curves"]
    loads = [sum(a) + sum(b) for a, b in zip(curves["timeline"]["running"], curves["timeline"]["waiting"], strict=True)]
    shown = data["timelines"][0]
    names = curves["placement"]["instances"]
    assert shown["instances"][0] == names[loads.index(max(loads))]
    assert shown["instances"][-1] == names[loads.index(min(loads))]
    assert max(shown["queued"]) == max(curves["timeline"]["queued"])
    requests = curves["placement"]["requests"]
    placed = data["placements"][0]
    assert [placed["requests"][0], placed["requests"][-1]] == [max(requests), min(requests)]
    assert placed["imbalance"]["requests"] == pytest.approx(max(requests) * 1_000 / sum(requests), rel=1e-3)
    assert placed["means"]["requests"] == pytest.approx(sum(requests) / 1_000, rel=1e-3)


def test_many_runs_share_what_there_is_room_for() -> None:
    page = page_of(large_document(instances=300, samples=120, arms=12, rates=8))
    assert len(page) < 4_000_000


def test_what_json_has_no_word_for_is_a_gap() -> None:
    document = small_document()
    document["summary"][0]["goodput_rps"] = {"mean": 1.5, "low": math.nan, "high": math.inf}
    assert Parsed(page_of(document)).data["summary"][0]["goodput_rps"] == {"mean": 1.5, "low": None, "high": None}


def test_rates_are_ordered_by_what_they_ask_for() -> None:
    document = small_document()
    for line in [*document["runs"], *document["summary"], *document["curves"]]:
        line["rate"] = {"0.5": "9rps", "1.2": "0.6"}[line["rate"]]
    assert page_data(document)["rates"] == [{"label": "0.6", "rps": pytest.approx(7.2)}, {"label": "9rps", "rps": 9.0}]


def test_without_a_capacity_the_rates_are_what_was_offered() -> None:
    document = small_document() | {"capacity_rps": None}
    offered = [run["rate_rps"] for run in document["runs"] if run["rate"] == "0.5"]
    assert page_data(document)["rates"][0]["rps"] == pytest.approx(sum(offered) / len(offered))


@pytest.mark.parametrize("missing", [("curves",), ("summary", "curves"), ("runs", "summary", "curves")])
def test_what_is_not_there_is_not_drawn(missing: tuple[str, ...]) -> None:
    document = small_document() | dict.fromkeys(missing, ())
    assert Parsed(page_of(document)).data["timelines"] == []
    assert Parsed(page_of({})).data["arms"] == []


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=300), st.integers(1, 50))
def test_peaks_lose_no_peak(values: list[int], width: int) -> None:
    found = peaks(values, width)
    assert len(found) == math.ceil(len(values) / width)
    assert all(found[place // width] >= value for place, value in enumerate(values))
    assert max(found) == max(values)


@given(st.integers(1, 2000), st.integers(2, 200))
def test_evenly_keeps_both_ends(count: int, kept: int) -> None:
    found = evenly(count, kept)
    assert found == sorted(set(found))
    assert len(found) == min(count, kept)
    assert (found[0], found[-1]) == (0, count - 1)
