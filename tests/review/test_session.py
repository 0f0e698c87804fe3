"""The page on which pairs are kept and dropped, in a real browser: by keys, by mouse, on a phone, and when it goes wrong."""

import os
import shutil
import threading

import pytest

import artaug as aa
from artaug import playground

pytestmark = [pytest.mark.browser, pytest.mark.loopback]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
PROMPTS = playground.prompts(5, seed=1)
REGIONS = (
    aa.Region(aa.Box(0.1, 0.2, 0.5, 0.8), "<b>a vivid</b> thing"),
    aa.Region(aa.Box(0.6, 0, 1, 0.5), "a lit sky"),
)


def drawn(number):
    prompt = PROMPTS[number]
    before, after = (playground.render(prompt + taste, seed=number) for taste in ("", ", vivid"))
    return aa.ImagePair(prompt=prompt, seed=number, before=before, after=after, plan=aa.Plan(prompt, REGIONS))


@pytest.fixture(scope="module")
def pairs():
    return [drawn(number) for number in range(5)]


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None and "CI" in os.environ:
        pytest.fail("no chromium on PATH to open the page with: run apt-get install chromium")
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH to open the page with")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in QUIET.split()])
        yield browser
        browser.close()


@pytest.fixture
def queue(tmp_path):
    return aa.ManualReview(tmp_path / "by-hand.jsonl")


@pytest.fixture
def opened(chromium, pairs, queue):
    """Serve the pairs in a thread and open the page; at the end finish, and complain of what the browser complained of."""
    complaints, contexts, threads = [], [], []

    def open_page(*, width=1280, height=800, scheme="light"):
        ready, address = threading.Event(), []
        asking = aa.ManualReview(queue.path, announce=lambda found: (address.append(found), ready.set()))
        thread = threading.Thread(target=asking.serve, args=(pairs,), kwargs={"review": True}, daemon=True)
        thread.start()
        assert ready.wait(10)
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address[0])
        page.wait_for_load_state("networkidle")
        threads.append((thread, page))
        return page

    open_page.complaints = complaints
    yield open_page
    for thread, page in threads:
        thread.join(1.5)  # one that was told to finish may need a moment
        if thread.is_alive():
            page.evaluate(
                "fetch('finish', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: '{}'})"
            )
        thread.join(10)
        assert not thread.is_alive()
    for context in contexts:
        context.close()
    assert complaints == []


def standing(page, text):
    """Wait until the page says so."""
    page.locator("#standing", has_text=text).wait_for(timeout=10_000)


def shown(page):
    """Which pictures a person sees, and whether they are there."""
    return page.evaluate(
        """() => [...document.querySelectorAll("figure")].filter((one) => one.checkVisibility()).map((one) => {
            const image = one.querySelector("img");
            return [one.className, image.getAttribute("src"), image.complete && image.naturalWidth];
        })"""
    )


def test_keys_keep_drop_and_undo(opened, queue, pairs):
    page = opened()
    assert page.locator("#prompt").inner_text() == PROMPTS[0]
    assert shown(page) == [["before", "before/0.png", 64], ["after", "after/0.png", 64]]

    for number, key in enumerate(["k", "ArrowLeft", "ArrowRight", "d"], start=1):
        page.keyboard.press(key)
        standing(page, f"{number} of 5")
    assert queue.standing(pairs) == aa.ReviewProgress(2, 2, 1)
    page.keyboard.press("u")
    standing(page, "3 of 5")
    assert page.locator("#prompt").inner_text() == PROMPTS[3]
    page.keyboard.press("Backspace")
    standing(page, "2 of 5")
    assert queue.standing(pairs) == aa.ReviewProgress(1, 1, 3)


def test_space_flips_between_before_and_after(opened):
    page = opened()
    page.keyboard.press(" ")
    assert [side for side, *_ in shown(page)] == ["after"]
    page.keyboard.press(" ")
    assert [side for side, *_ in shown(page)] == ["before"]
    page.keyboard.press("s")
    assert len(shown(page)) == 2


def test_boxes_lie_where_the_regions_are_and_words_are_text(opened):
    page = opened()
    frame, box = (page.locator(f"figure.after {part}").first.bounding_box() for part in (".canvas", ".canvas b"))
    assert (box["x"] - frame["x"]) / frame["width"] == pytest.approx(0.1, abs=0.01)
    assert (box["y"] - frame["y"]) / frame["height"] == pytest.approx(0.2, abs=0.01)
    assert box["width"] / frame["width"] == pytest.approx(0.4, abs=0.02)
    assert page.locator("#words li").all_inner_texts() == ["<b>a vivid</b> thing", "a lit sky"]
    page.keyboard.press("b")
    assert not page.locator("figure.after .canvas b").first.is_visible()


def test_later_puts_a_pair_at_the_end(opened, queue, pairs):
    page = opened()
    page.keyboard.press("l")
    for number in range(1, 5):
        page.keyboard.press("d")
        standing(page, f"{number} of 5")
    assert page.locator("#prompt").inner_text() == PROMPTS[0]
    page.keyboard.press("k")
    standing(page, "5 of 5")
    assert page.locator("#ending").inner_text() == "Every pair is decided"
    page.keyboard.press("Enter")
    page.locator("#ending", has_text="Finished").wait_for(timeout=10_000)
    assert queue.standing(pairs) == aa.ReviewProgress(1, 4, 0)


def test_buttons_do_what_keys_do_on_a_phone_by_night(opened, queue, pairs):
    page = opened(width=390, height=844, scheme="dark")
    assert len(shown(page)) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 17, 20)"
    page.locator("#keep").click()
    standing(page, "1 of 5")
    page.locator("#drop").click()
    standing(page, "2 of 5")
    page.locator("#undo").click()
    standing(page, "1 of 5")
    assert queue.standing(pairs) == aa.ReviewProgress(1, 0, 4)


def test_a_second_visit_begins_where_the_first_ended(opened, queue, pairs):
    page = opened()
    page.keyboard.press("k")
    standing(page, "1 of 5")
    page.reload()
    standing(page, "1 of 5")
    assert page.locator("#prompt").inner_text() == PROMPTS[1]
    page.keyboard.press("u")
    standing(page, "0 of 5")
    assert queue.standing(pairs) == aa.ReviewProgress(0, 0, 5)


def test_a_decision_that_is_not_written_is_not_shown_as_made(opened, queue):
    page = opened()
    queue.path.mkdir()
    page.keyboard.press("k")
    page.locator("#fault", has_text="This was not written down").wait_for(timeout=10_000)
    assert page.locator("#standing").inner_text() == "0 of 5 decided"
    queue.path.rmdir()
    page.keyboard.press("k")
    standing(page, "1 of 5")
    assert not page.locator("#fault").is_visible()
    assert [complaint for complaint in opened.complaints if "507" not in complaint] == []
    opened.complaints.clear()
