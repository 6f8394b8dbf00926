"""The page of a comparison in a real browser, from a file and without a network: that it draws, and answers to hand and keyboard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Opened, running_browser
from comparison_document import hostile_document, large_document, small_document

from control_plane.simulator.page import page_of

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

#: two against the rate, three distributions, the queue, the heat map
CANVASES = 7
HEAT = "document.querySelector('#heat canvas').toDataURL()"
Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as found:
        yield found


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a document's page. Nothing may have been complained of when the test is over."""
    pages: list[Opened] = []

    def open_(document: dict[str, Any], **options: Any) -> Opened:
        file = tmp_path / f"comparison {len(pages)}.html"
        file.write_text(page_of(document), encoding="utf-8")
        pages.append(Opened(browser, file, **options))
        return pages[-1]

    yield open_
    complaints = [complaint for page in pages for complaint in page.complaints]
    for page in pages:
        page.context.close()
    assert complaints == []


def test_every_plot_is_drawn(opened: Open) -> None:
    page = opened(small_document())
    assert page.page.title() == "made_up on 3xh100-llama3-8b: 2 arms compared"
    painted = page.painted()
    assert len(painted) == CANVASES
    assert all(pixels > 500 and colours > 5 for pixels, colours in painted)
    assert page.page.locator("#bars svg rect").count() == 2 * 3 * 2
    assert page.page.locator("#summary tbody tr").count() == 14
    assert "simulated" in page.page.inner_text("#head")
    assert "control-plane compare --trace 'made up'" in page.page.inner_text("#head")


@pytest.mark.parametrize(
    ("name", "value", "changes"),
    [
        ("rate", "0", "#summary"),
        ("left", "ttft_p99_ms", "#by-rate-left"),
        ("right", "fairness_jain", "#by-rate-right"),
        ("line", "running_total", "#queue"),
        ("arm", "1", "#heat"),
        ("heat", "kv", "#heat"),
        ("bars", "requests", "#bars"),
        ("order", "most", "#bars"),
    ],
)
def test_each_choice_changes_what_it_names(opened: Open, name: str, value: str, changes: str) -> None:
    page = opened(small_document())
    place = page.page.locator(changes)
    before = place.screenshot()
    page.choose(name, value)
    assert place.screenshot() != before
    assert all(pixels > 500 for pixels, _ in page.painted())
    assert page.page.evaluate("document.activeElement.name") == name  # the keyboard stays where it was


def test_an_arm_can_be_left_out(opened: Open) -> None:
    page = opened(small_document())
    assert page.page.locator("#summary thead th").count() == 3
    page.page.get_by_role("checkbox").nth(1).uncheck()
    assert page.page.locator("#summary thead th").all_inner_texts() == ["Mean over seeds", "adaptive + load_balanced"]
    page.page.get_by_role("checkbox").nth(0).uncheck()
    assert page.page.locator("#summary thead th").count() == 1
    page.page.get_by_role("checkbox").nth(0).check()
    assert len(page.painted()) == CANVASES


def test_differences_are_called_what_they_are(opened: Open) -> None:
    document = small_document()
    for line in document["summary"]:
        if "against_first" in line:
            line["against_first"]["goodput_rps"] = {"difference": -1.0, "low": -1.5, "high": -0.5}
            line["against_first"]["ttft_p99_ms"] = {"difference": -9.0, "low": -12.0, "high": -6.0}
            line["against_first"]["tpot_p99_ms"] = {"difference": -9.0, "low": -20.0, "high": 2.0}
    page = opened(document)
    assert page.page.locator("#verdict .badge").all_inner_texts() == ["worse"]

    def cell(metric: str) -> str:
        return str(page.page.inner_text(f'#summary tr[data-metric="{metric}"] td:last-child'))

    assert "−1.0 [−1.5, −0.50] worse" in cell("goodput_rps")
    assert "−9.0 [−12, −6.0] better" in cell("ttft_p99_ms")
    assert "better" not in cell("tpot_p99_ms")
    assert "worse" not in cell("tpot_p99_ms")


def test_a_plot_is_read_with_the_keyboard(opened: Open) -> None:
    page = opened(small_document())
    plot = page.page.locator("#by-rate-left .uplot")
    plot.focus()
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("ArrowRight")
    tip = plot.locator(".tip")
    assert tip.is_visible()
    assert "1.2 × capacity" in tip.inner_text()
    assert "fifo + round_robin" in tip.inner_text()
    page.page.keyboard.press("Tab")
    assert not tip.is_visible()
    page.page.locator("#cdf-ttft .uplot").focus()
    page.page.keyboard.press("ArrowUp")
    page.page.keyboard.press("ArrowUp")
    assert "1 % of completed requests within" in page.page.inner_text("#cdf-ttft .tip")


def test_the_pointer_reads_the_heat_map(opened: Open) -> None:
    page = opened(small_document())
    page.page.locator("#heat .u-over").hover()
    assert "running" in page.page.inner_text("#heat .tip")
    assert page.page.inner_text("#heat .tip").startswith("e001 at ")


def test_all_figures_are_there_to_read(opened: Open) -> None:
    document = small_document()
    page = opened(document)
    for summary in page.page.locator("#all summary").all():
        summary.click()
    page.page.locator("#all table").nth(1).wait_for()
    assert document["runs"][-1]["event_digest"] in page.page.inner_text("#all")


def test_names_do_no_harm(opened: Open) -> None:
    page = opened(hostile_document())
    assert page.page.evaluate("window.taken") is None
    assert "</script><script>window.taken = 1</script>" in page.page.inner_text("#head")
    assert page.page.locator("img").count() == 0
    page.choose("bars", "requests")
    assert page.page.locator("#bars .key").count() == 2
    assert "__proto__" in page.page.inner_text("#bars")
    assert len(page.painted()) == CANVASES


def test_what_is_slipped_in_does_not_run(opened: Open) -> None:
    page = opened(small_document())
    page.page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.taken = 3";
        document.body.append(script, Object.assign(document.createElement("img"), { src: "https://example.org/x.png" }));
    }""")
    assert page.page.evaluate("window.taken") is None
    page.page.wait_for_function("() => document.images[0].complete")
    refused = [complaint for complaint in page.complaints if "Content Security Policy" in complaint]
    assert ["script" in refused[0], "image" in refused[1]] == [True, True]
    page.complaints.clear()


@pytest.mark.parametrize("width", [320, 390, 820])
def test_a_narrow_screen_is_enough(opened: Open, width: int) -> None:
    page = opened(small_document(), viewport={"width": width, "height": 800}, device_scale_factor=2)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    assert len(page.painted()) == CANVASES
    page.page.set_viewport_size({"width": 1200, "height": 800})
    page.page.wait_for_function("() => document.querySelector('#queue canvas').clientWidth > 1000")


def test_dark_and_printed(opened: Open) -> None:
    page = opened(small_document(), color_scheme="dark")
    dark = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    drawn = page.page.evaluate(HEAT)
    page.page.emulate_media(color_scheme="light")
    assert page.page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    page.page.wait_for_function(f"drawn => ({HEAT}) !== drawn", arg=drawn)
    assert len(page.page.pdf(format="A4")) > 20_000


def test_a_large_comparison_opens(opened: Open) -> None:
    page = opened(large_document())
    assert len(page.painted()) == CANVASES
    assert "48 of 1,000 instances" in page.page.inner_text("#timeline-hint")
    page.choose("order", "most")
    assert page.page.locator("#bars svg g").count() == 8 * 128


@pytest.mark.parametrize("missing", [("curves",), ("runs", "summary", "curves")])
def test_what_is_not_there_is_said(opened: Open, missing: tuple[str, ...]) -> None:
    page = opened({**small_document(), **{name: [] for name in missing}})
    said = "No timeline of this arm and rate was kept." if "runs" not in missing else "No run is in this comparison."
    assert said in page.page.inner_text("main")


def test_one_arm_at_one_rate_with_one_seed(opened: Open) -> None:
    document = small_document()
    for name in ("runs", "summary", "curves"):
        document[name] = document[name][:1]
    document["summary"][0]["seeds"] = 1
    document["summary"][0]["goodput_rps"] |= {"low": None, "high": None}
    page = opened(document)
    assert len(page.painted()) == CANVASES
    assert "One seed: no interval can be given" in page.page.inner_text("#verdict")
