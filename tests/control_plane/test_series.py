"""Finding series by byte search, against a parser that reads everything: both must tell the same of any legal page."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from control_plane.fleet.scraper import SERIES, PageReader, parse_metrics
from control_plane.fleet.series import find, labels_of, samples

WANTED = sorted({name.decode() for names in SERIES.values() for name in names})
#: names that begin or end as the wanted ones do, and are others
DECOYS = [*(name + "_by_reason" for name in WANTED[:4]), *("x" + name for name in WANTED[:4]), "vllm:num_requests", "up"]
#: label values with all that has a meaning in the format: quotes, braces, backslashes, line ends, names of series
AWKWARD = (
    '"} 9 engine="3"',
    '\nvllm:num_requests_running{engine="7"} 5.0',
    ',engine="',
    "vllm:num_requests_running 3",
    "",
    "é",
    "a\\",
    '\\"',
)
VALUES = ("NaN", "+Inf", "1e3", "0", "0.0", "2.5e-3", "1.79e+09", "17", "0.75", "123456789.0")


def escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def awkward(rng: Random) -> str:
    return rng.choice(AWKWARD) if rng.random() < 0.5 else "".join(rng.choices('ab"\\\n{}, =1', k=rng.randrange(6)))


def family(rng: Random, name: str) -> list[str]:
    """Lines of one family; its samples stand together, as the format says."""
    lines = [f"# HELP {name} {escaped(awkward(rng))}", f"# TYPE {name} gauge"] if rng.random() < 0.7 else []
    for rank in rng.sample(range(12), rng.randint(1, 4)):
        labels = {"model_name": awkward(rng), "engine": str(rank), "z": awkward(rng)}
        kept = [key for key in rng.sample(sorted(labels), 3) if key == "engine" or rng.random() < 0.7]
        shown = ",".join(f'{key}="{escaped(labels[key])}"' for key in kept)
        lines.append(f"{name}{{{shown}}} {rng.choice(VALUES)}{rng.choice(('', ' 1795492790000'))}")
    return lines


def page_of(seed: int) -> str:
    rng = Random(seed)
    names = rng.sample(WANTED + DECOYS, rng.randint(0, 9))
    return "".join(line + "\n" for name in names for line in family(rng, name))


SEEDS = st.integers(0, 2**32)


def by_parser(page: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if math.isfinite(sample.value):
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


@given(SEEDS, st.integers(0, 3000))
def test_any_legal_page_is_read_as_by_the_client_librarys_own_parser(seed: int, near: int) -> None:
    page = page_of(seed)
    expected = by_parser(page)
    data = page.encode()
    for name in WANTED:
        at = find(data, name.encode(), near)
        found = samples(data, name.encode(), at) if at >= 0 else []
        told = expected.get(name, [])
        assert [(sample.rank, sample.value) for sample in found] == [(int(labels["engine"]), value) for labels, value in told]
        shown = [labels_of(sample).get(b"model_name") for sample in found]
        assert shown == [escaped(labels["model_name"]).encode() if "model_name" in labels else None for labels, _ in told]


@given(st.lists(SEEDS, min_size=1, max_size=4))
def test_a_reader_that_remembers_places_reads_as_one_that_knows_nothing(seeds: list[int]) -> None:
    reader = PageReader()
    for seed in seeds:
        page = page_of(seed).encode()
        assert reader.read(page) == parse_metrics(page)


@given(st.binary(max_size=400) | st.text(st.sampled_from('vllm:num_requests_running{} "\\\n5.'), max_size=200).map(str.encode))
def test_no_page_makes_it_fail(page: bytes) -> None:
    scrape = parse_metrics(page)
    assert scrape.running is None or scrape.running >= 0 or b"-" in page


@pytest.mark.parametrize("spaces", [" ", "  ", "\t", " \t "])
def test_blanks_of_any_kind_stand_before_a_value(spaces: str) -> None:
    assert parse_metrics(f"vllm:num_requests_running{spaces}5\n".encode()).running == 5
    assert parse_metrics(f'vllm:num_requests_running{{engine="0"}}{spaces}5\r\n'.encode()).running == 5


def test_what_follows_the_value_is_not_the_value() -> None:
    page = b'vllm:num_requests_running{engine="0"} 5.0 # {trace_id="a"} 7.0 1.0\n'
    assert parse_metrics(page).running == 5
