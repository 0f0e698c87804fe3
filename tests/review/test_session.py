"""The review page in a real browser: keys, buttons, a phone in dark mode, and failed writes."""

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


def rendered_pair(index):
    prompt = PROMPTS[index]
    before, after = (playground.render(prompt + words, seed=index) for words in ("", ", vivid"))
    return aa.ImagePair(prompt=prompt, seed=index, before=before, after=after, plan=aa.Plan(prompt, REGIONS))


@pytest.fixture(scope="module")
def pairs():
    return [rendered_pair(index) for index in range(5)]


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
def review(tmp_path):
    return aa.ManualReview(tmp_path / "by-hand.jsonl")


@pytest.fixture
def opened(chromium, pairs, review):
    """Serve the pairs in a thread and open the page; at the end finish, and fail if the browser logged anything."""
    messages, contexts, threads = [], [], []

    def open_page(*, width=1280, height=800, scheme="light"):
        ready, addresses = threading.Event(), []
        served = aa.ManualReview(review.path, announce=lambda address: (addresses.append(address), ready.set()))
        thread = threading.Thread(target=served.serve, args=(pairs,), kwargs={"revisit": True}, daemon=True)
        thread.start()
        assert ready.wait(10)
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(addresses[0])
        page.wait_for_load_state("networkidle")
        threads.append((thread, page))
        return page

    open_page.messages = messages
    yield open_page
    for thread, page in threads:
        thread.join(1.5)  # a session that is finishing may need a moment
        if thread.is_alive():
            page.evaluate(
                "fetch('finish', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: '{}'})"
            )
        thread.join(10)
        assert not thread.is_alive()
    for context in contexts:
        context.close()
    assert messages == []


def wait_for_progress(page, text):
    """Wait until the page shows this progress."""
    page.locator("#progress", has_text=text).wait_for(timeout=10_000)


def visible_images(page):
    """The side, the address and the width of each visible image."""
    return page.evaluate(
        """() => [...document.querySelectorAll("figure")].filter((figure) => figure.checkVisibility()).map((figure) => {
            const image = figure.querySelector("img");
            return [figure.className, image.getAttribute("src"), image.complete && image.naturalWidth];
        })"""
    )


def test_keys_keep_drop_and_undo(opened, review, pairs):
    page = opened()
    assert page.locator("#prompt").inner_text() == PROMPTS[0]
    assert visible_images(page) == [["before", "before/0.png", 64], ["after", "after/0.png", 64]]

    for number, key in enumerate(["k", "ArrowLeft", "ArrowRight", "d"], start=1):
        page.keyboard.press(key)
        wait_for_progress(page, f"{number} of 5")
    assert review.progress(pairs) == aa.ReviewProgress(2, 2, 1)
    page.keyboard.press("u")
    wait_for_progress(page, "3 of 5")
    assert page.locator("#prompt").inner_text() == PROMPTS[3]
    page.keyboard.press("Backspace")
    wait_for_progress(page, "2 of 5")
    assert review.progress(pairs) == aa.ReviewProgress(1, 1, 3)


def test_space_flips_between_before_and_after(opened):
    page = opened()
    page.keyboard.press(" ")
    assert [side for side, *_ in visible_images(page)] == ["after"]
    page.keyboard.press(" ")
    assert [side for side, *_ in visible_images(page)] == ["before"]
    page.keyboard.press("s")
    assert len(visible_images(page)) == 2


def test_boxes_lie_where_the_regions_are_and_prompts_are_escaped(opened):
    page = opened()
    frame, box = (page.locator(f"figure.after {part}").first.bounding_box() for part in (".canvas", ".canvas b"))
    assert (box["x"] - frame["x"]) / frame["width"] == pytest.approx(0.1, abs=0.01)
    assert (box["y"] - frame["y"]) / frame["height"] == pytest.approx(0.2, abs=0.01)
    assert box["width"] / frame["width"] == pytest.approx(0.4, abs=0.02)
    assert page.locator("#regions li").all_inner_texts() == ["<b>a vivid</b> thing", "a lit sky"]
    page.keyboard.press("b")
    assert not page.locator("figure.after .canvas b").first.is_visible()


def test_later_moves_a_pair_to_the_end(opened, review, pairs):
    page = opened()
    page.keyboard.press("l")
    for number in range(1, 5):
        page.keyboard.press("d")
        wait_for_progress(page, f"{number} of 5")
    assert page.locator("#prompt").inner_text() == PROMPTS[0]
    page.keyboard.press("k")
    wait_for_progress(page, "5 of 5")
    assert page.locator("#ending").inner_text() == "Every pair is decided"
    page.keyboard.press("Enter")
    page.locator("#ending", has_text="Finished").wait_for(timeout=10_000)
    assert review.progress(pairs) == aa.ReviewProgress(1, 4, 0)


def test_buttons_do_what_keys_do_on_a_phone_in_dark_mode(opened, review, pairs):
    page = opened(width=390, height=844, scheme="dark")
    assert len(visible_images(page)) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 17, 20)"
    page.locator("#keep").click()
    wait_for_progress(page, "1 of 5")
    page.locator("#drop").click()
    wait_for_progress(page, "2 of 5")
    page.locator("#undo").click()
    wait_for_progress(page, "1 of 5")
    assert review.progress(pairs) == aa.ReviewProgress(1, 0, 4)


def test_a_reload_continues_at_the_next_undecided_pair(opened, review, pairs):
    page = opened()
    page.keyboard.press("k")
    wait_for_progress(page, "1 of 5")
    page.reload()
    wait_for_progress(page, "1 of 5")
    assert page.locator("#prompt").inner_text() == PROMPTS[1]
    page.keyboard.press("u")
    wait_for_progress(page, "0 of 5")
    assert review.progress(pairs) == aa.ReviewProgress(0, 0, 5)


def test_a_decision_that_was_not_saved_is_not_shown(opened, review):
    page = opened()
    review.path.mkdir()
    page.keyboard.press("k")
    page.locator("#error", has_text="The decision was not saved").wait_for(timeout=10_000)
    assert page.locator("#progress").inner_text() == "0 of 5 decided"
    review.path.rmdir()
    page.keyboard.press("k")
    wait_for_progress(page, "1 of 5")
    assert not page.locator("#error").is_visible()
    assert [message for message in opened.messages if "507" not in message] == []
    opened.messages.clear()
