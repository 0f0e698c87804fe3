"""The report in a real browser: at a desk and on a phone, by day and by night, by mouse, keys and finger, offline."""

import os
import shutil
from dataclasses import dataclass

import pytest
import torch
from playwright.sync_api import sync_playwright

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.report import write_report
from artaug.scorers import Chroma, Exposure

pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
LORA = aa.LoRA({"blocks.0.to_q": aa.LowRank(torch.ones(2, 4), torch.ones(4, 2))})
LOOK_AT_ALL = """async () => {
    const images = [...document.querySelectorAll("main img:not([hidden])")];
    for (const one of images) {
        one.scrollIntoView();
        await one.decode();
    }
    return images.filter((one) => one.naturalWidth).length;
}"""
SIZES = {"desk": (1280, 900), "phone": (390, 844)}


@dataclass(frozen=True)
class Painter(aa.Synthesizer):
    """The playground's renderer: duller without regions, so that a critic finds something."""

    taste: str = ""

    def synthesize(self, plan, *, seed):
        taste = ", vivid, softly lit" if plan.regions else self.taste
        return playground.render(plan.prompt + taste, seed=seed)


@pytest.fixture(scope="module")
def run():
    """A real loop but for the training: drawn, criticised, redrawn and judged."""
    attempts = tuple(
        aa.improve(
            playground.prompts(20, seed=0),
            synthesizer=Painter(),
            critic=PhotometricCritic(),
            planner=aa.GreedyPlanner(max_regions=2),
            keep=aa.Gain(Chroma(), at_least=0.03),
            seed=0,
        )
    )
    losses = tuple(1 / (1 + step) for step in range(50))
    training = aa.TrainingResult(lora=LORA, losses=losses, pairs=20, steps=50, seconds=2.5)
    seconds = {"draw": 4.0, "critique": 1.0, "redraw": 8.0, "train": 30.0}
    rounds = (
        aa.Round(number=1, attempts=attempts, training=training, lora=LORA, seconds=seconds, gain=None, accepted=True),
    )
    return aa.Enhancement(rounds=rounds, stop_reason="all 1 rounds ran")


@pytest.fixture(scope="module")
def comparison():
    return aa.compare(
        Painter(),
        {"vivid": Painter(", vivid"), "vivid and lit": Painter(", vivid, softly lit")},
        playground.prompts(8, seed=0, held_out=True),
        scorers=[Chroma(), Exposure()],
        filtered_by=["Chroma"],
        guardrails=[aa.Guardrail("Exposure", 0.02)],
        progress=False,
    )


@pytest.fixture(scope="module")
def pages(run, comparison, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with a space")
    written = {
        place: write_report(folder / f"{place}.html", result=run, comparison=comparison, pictures=place)
        for place in ("inline", "folder")
    }
    return {
        **written,
        "run": write_report(folder / "run.html", result=run),
        "comparison": write_report(folder / "comparison.html", comparison=comparison),
    }


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None and "CI" in os.environ:
        pytest.fail("no chromium on PATH to open the report with: run apt-get install chromium")
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH to open the report with")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in QUIET.split()])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, pages):
    """Open a page as a person would, and complain at the end about all that the browser complained about."""
    contexts, complaints, requests = [], [], []

    def open_page(name="inline", *, size="desk", scheme="light", touch=False, path=None):
        width, height = SIZES[size]
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=touch, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url[:100]}"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((path or pages[name]).as_uri())
        return page

    open_page.complaints, open_page.requests = complaints, requests
    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def middle(page, selector):
    """Where to press: the left edge, the middle height and the width of the first that matches."""
    found = page.locator(selector).first
    found.scroll_into_view_if_needed()
    box = found.bounding_box()
    return box["x"], box["y"] + box["height"] / 2, box["width"]


def handle(page):
    """Where the first picture's handle is, as its slider says and as it is drawn, both in percent."""
    return page.evaluate(
        """() => {
            const wipe = document.querySelector("main .wipe"), box = wipe.getBoundingClientRect();
            const bar = wipe.querySelector(".bar").getBoundingClientRect();
            const drawn = 100 * (bar.left + bar.width / 2 - box.left) / box.width;
            return [Number(wipe.querySelector("input").value), Math.round(drawn)];
        }"""
    )


@pytest.mark.parametrize(
    ("name", "size", "scheme"),
    [
        ("inline", "desk", "light"),
        ("inline", "desk", "dark"),
        ("inline", "phone", "light"),
        ("inline", "phone", "dark"),
        ("folder", "desk", "dark"),
        ("folder", "phone", "light"),
    ],
)
def test_every_picture_loads_and_nothing_is_wider_than_the_screen(name, size, scheme, opened):
    page = opened(name, size=size, scheme=scheme)

    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    loaded = page.evaluate(LOOK_AT_ALL)

    assert loaded >= 2 * 8 + 2 * 20
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(250, 250, 248)" if scheme == "light" else "rgb(16, 17, 20)")


@pytest.mark.parametrize("name", ["run", "comparison"])
@pytest.mark.parametrize("size", SIZES)
def test_half_a_report_is_a_whole_page(name, size, opened):
    page = opened(name, size=size)

    assert page.locator("h1").inner_text()
    assert page.locator("section").count() == {"run": 2, "comparison": 3}[name]
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]


def test_only_the_pictures_in_view_are_fetched_from_the_folder(opened):
    page = opened("folder", size="phone")

    fetched = sum(".png" in address for address in opened.requests)
    assert page.locator("main img").count() == 8 * 3 + 20 * 2
    assert fetched < 30  # that all come when they are scrolled to is another test's


def test_the_mouse_drags_the_handle(opened):
    page = opened()
    left, height, width = middle(page, "main .wipe")

    page.mouse.move(left + 0.5 * width, height)
    page.mouse.down()
    page.mouse.move(left + 0.8 * width, height, steps=3)
    page.mouse.up()
    page.mouse.move(left + 0.1 * width, height)

    assert handle(page) == [80, 80]


def test_a_finger_moves_the_handle(opened):
    page = opened(size="phone", touch=True)
    left, height, width = middle(page, "main .wipe")

    page.touchscreen.tap(left + 0.2 * width, height)

    assert handle(page) == [20, 20]


def test_keys_move_the_handle_and_go_from_picture_to_picture(opened):
    page = opened()
    sliders = page.locator("main .wipe input")

    sliders.first.focus()
    page.keyboard.press("ArrowRight")
    assert handle(page) == [55, 55]
    page.keyboard.press("Home")
    assert handle(page) == [0, 0]
    assert sliders.first.get_attribute("aria-valuetext") == "0% before"
    page.keyboard.press("ArrowDown")
    assert sliders.nth(1).evaluate("(one) => one === document.activeElement")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    last = page.locator(".round > .grid .wipe input").last
    assert last.evaluate("(one) => one === document.activeElement")


def test_focus_can_be_seen(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") > 0

    page.locator("main .wipe input").first.focus()
    page.keyboard.press("ArrowRight")

    assert page.locator("main .wipe").first.evaluate("(one) => getComputedStyle(one).outlineStyle") == "solid"


def test_a_picture_opens_large_and_keys_go_on_from_there(opened):
    page = opened()
    cards = page.locator("#pictures .card")
    page.locator("main .wipe input").first.focus()

    page.keyboard.press("Enter")
    large = page.locator("dialog .wipe").bounding_box()
    assert large["width"] > 1.5 * cards.first.bounding_box()["width"]
    assert page.locator("dialog h3").inner_text() == cards.first.locator("h3").inner_text()
    page.keyboard.press("ArrowDown")
    assert page.locator("dialog h3").inner_text() == cards.nth(1).locator("h3").inner_text()
    page.keyboard.press("End")
    assert page.locator("dialog input").evaluate("(one) => one.value") == "100"
    page.keyboard.press("Escape")

    assert not page.locator("dialog").is_visible()
    assert cards.nth(1).locator("input").evaluate("(one) => one === document.activeElement")


@pytest.mark.parametrize("size", SIZES)
def test_the_enlarged_picture_and_its_words_fit_the_screen(size, opened):
    page = opened(size=size)
    page.locator(".round .enlarge").first.click(force=True)

    box = page.locator("dialog").bounding_box()

    width, height = SIZES[size]
    assert 0 <= box["x"] < box["x"] + box["width"] <= width
    assert 0 <= box["y"] < box["y"] + box["height"] <= height
    page.locator("dialog .close").click()
    assert not page.locator("dialog").is_visible()


def test_boxes_and_words_come_on_demand(opened):
    page = opened()
    card = page.locator(".round .card").first
    assert not card.locator(".boxes").is_visible()

    card.locator("summary").click()
    assert card.locator(".boxes").is_visible()
    assert card.locator(".words ol").is_visible()
    card.locator("input").focus()
    page.keyboard.press("w")
    assert not card.locator(".boxes").is_visible()

    page.get_by_role("button", name="Boxes and words").click()
    assert page.locator(".round > .grid .boxes:visible").count() == 12
    page.get_by_role("button", name="Boxes and words", pressed=True).click()
    assert page.locator(".round > .grid .boxes:visible").count() == 0


def test_another_candidate_takes_the_right_half(opened):
    page = opened()
    card = page.locator("#pictures .card").first
    assert "vivid and lit" in card.locator(".names").inner_text()
    shown = card.locator("img[data-arm]:visible").get_attribute("src")

    page.get_by_label("vivid", exact=True).check(force=True)

    assert "vivid and lit" not in card.locator(".names").inner_text()
    assert card.locator("img[data-arm]:visible").count() == 1
    assert card.locator("img[data-arm]:visible").get_attribute("src") != shown


def test_what_has_a_role_has_a_name(opened):
    page = opened()
    tree = page.locator("body").aria_snapshot()

    nameless = [line for line in tree.splitlines() if line.strip() in {"- slider", "- button", "- img", "- radio"}]

    assert nameless == []
    assert tree.count('slider "Before and after: ') == 8 + 12


def test_printed_pictures_lie_side_by_side(opened):
    page = opened()
    page.emulate_media(media="print")
    wipe = page.locator("main .wipe").first

    before, after = (wipe.locator(one).first.bounding_box() for one in (".before img", "img[data-arm]:not([hidden])"))

    assert after["x"] >= before["x"] + before["width"]
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("name", ["inline", "folder"])
def test_a_foreign_script_does_not_run(name, opened, pages):
    foreign = pages[name].with_name(f"{name}_foreign.html")
    text = pages[name].read_text(encoding="utf-8")
    foreign.write_text(text.replace("</main>", "<script>document.title = 'taken'</script></main>"), encoding="utf-8")

    page = opened(path=foreign)

    assert page.title() != "taken"
    assert "Content Security Policy" in " ".join(opened.complaints)  # so that silence elsewhere means something
    opened.complaints.clear()
