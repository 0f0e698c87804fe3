"""The report in a real browser: desktop and phone, light and dark, mouse, keys and finger, offline."""

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
SCROLL_TO_ALL_IMAGES = """async () => {
    const images = [...document.querySelectorAll("main img:not([hidden])")];
    for (const image of images) {
        image.scrollIntoView();
        await image.decode();
    }
    return images.filter((image) => image.naturalWidth).length;
}"""
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@dataclass(frozen=True)
class Renderer(aa.Synthesizer):
    """The playground's renderer: duller without regions, so that the critic has suggestions."""

    adjectives: str = ""

    def synthesize(self, plan, *, seed):
        adjectives = ", vivid, softly lit" if plan.regions else self.adjectives
        return playground.render(plan.prompt + adjectives, seed=seed)


@dataclass(frozen=True)
class FaintChroma(aa.Scorer):
    """Chroma in a unit in which a change is some millionths."""

    def score(self, image, prompt):
        return 1e-5 * Chroma().score(image, prompt)


@pytest.fixture(scope="module")
def run():
    """A real loop without the training."""
    attempts = tuple(
        aa.improve(
            playground.prompts(20, seed=0),
            synthesizer=Renderer(),
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
    return aa.Enhancement(rounds=rounds, stop_reason="its one round ran")


@pytest.fixture(scope="module")
def comparison():
    return aa.compare(
        Renderer(),
        {"vivid": Renderer(", vivid"), "vivid and lit": Renderer(", vivid, softly lit")},
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
        placement: write_report(folder / f"{placement}.html", result=run, comparison=comparison, images=placement)
        for placement in ("inline", "folder")
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
    """Open pages in the browser; at the end, fail for every error that the browser reported."""
    contexts, problems, requests = [], [], []

    def open_page(name="inline", *, size="desktop", scheme="light", touch=False, path=None):
        width, height = SIZES[size]
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=touch, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(f"failed: {request.url[:100]}"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((path or pages[name]).as_uri())
        return page

    open_page.problems, open_page.requests = problems, requests
    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def left_center_width(page, selector):
    """Left edge, vertical center and width of the first element that matches."""
    element = page.locator(selector).first
    element.scroll_into_view_if_needed()
    box = element.bounding_box()
    return box["x"], box["y"] + box["height"] / 2, box["width"]


def slider_position(page):
    """Position of the first slider in percent, as its input says and as it is drawn."""
    return page.evaluate(
        """() => {
            const slider = document.querySelector("main .slider"), box = slider.getBoundingClientRect();
            const bar = slider.querySelector(".bar").getBoundingClientRect();
            const drawn = 100 * (bar.left + bar.width / 2 - box.left) / box.width;
            return [Number(slider.querySelector("input").value), Math.round(drawn)];
        }"""
    )


@pytest.mark.parametrize(
    ("name", "size", "scheme"),
    [
        ("inline", "desktop", "light"),
        ("inline", "desktop", "dark"),
        ("inline", "phone", "light"),
        ("inline", "phone", "dark"),
        ("folder", "desktop", "dark"),
        ("folder", "phone", "light"),
    ],
)
def test_every_picture_loads_and_nothing_is_wider_than_the_screen(name, size, scheme, opened):
    page = opened(name, size=size, scheme=scheme)

    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    loaded = page.evaluate(SCROLL_TO_ALL_IMAGES)

    assert loaded >= 2 * 8 + 2 * 20
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(250, 250, 248)" if scheme == "light" else "rgb(16, 17, 20)")


@pytest.mark.parametrize("name", ["run", "comparison"])
@pytest.mark.parametrize("size", SIZES)
def test_a_report_of_a_run_or_a_comparison_alone_is_complete(name, size, opened):
    page = opened(name, size=size)

    assert page.locator("h1").inner_text()
    assert page.locator("section").count() == {"run": 2, "comparison": 3}[name]
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]


def test_only_visible_images_are_loaded_from_the_folder(opened):
    page = opened("folder", size="phone")

    loaded = sum(".png" in url for url in opened.requests)
    assert page.locator("main img").count() == 8 * 3 + 20 * 2
    assert loaded < 30  # another test scrolls to all of them


def test_the_mouse_drags_the_slider(opened):
    page = opened()
    left, height, width = left_center_width(page, "main .slider")

    page.mouse.move(left + 0.5 * width, height)
    page.mouse.down()
    page.mouse.move(left + 0.8 * width, height, steps=3)
    page.mouse.up()
    page.mouse.move(left + 0.1 * width, height)

    assert slider_position(page) == [80, 80]


def test_a_finger_moves_the_slider(opened):
    page = opened(size="phone", touch=True)
    left, height, width = left_center_width(page, "main .slider")

    page.touchscreen.tap(left + 0.2 * width, height)

    assert slider_position(page) == [20, 20]


def test_keys_move_the_slider_and_go_from_picture_to_picture(opened):
    page = opened()
    sliders = page.locator("main .slider input")

    sliders.first.focus()
    page.keyboard.press("ArrowRight")
    assert slider_position(page) == [55, 55]
    page.keyboard.press("Home")
    assert slider_position(page) == [0, 0]
    assert sliders.first.get_attribute("aria-valuetext") == "0% before"
    page.keyboard.press("ArrowDown")
    assert sliders.nth(1).evaluate("(element) => element === document.activeElement")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    last = page.locator(".round > .grid .slider input").last
    assert last.evaluate("(element) => element === document.activeElement")


def test_the_focus_is_visible(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") > 0

    page.locator("main .slider input").first.focus()
    page.keyboard.press("ArrowRight")

    assert page.locator("main .slider").first.evaluate("(element) => getComputedStyle(element).outlineStyle") == "solid"


def test_a_picture_is_enlarged_and_keys_work_there(opened):
    page = opened()
    cards = page.locator("#pictures .card")
    page.locator("main .slider input").first.focus()

    page.keyboard.press("Enter")
    enlarged = page.locator("dialog .slider").bounding_box()
    assert enlarged["width"] > 1.5 * cards.first.bounding_box()["width"]
    assert page.locator("dialog h3").inner_text() == cards.first.locator("h3").inner_text()
    page.keyboard.press("ArrowDown")
    assert page.locator("dialog h3").inner_text() == cards.nth(1).locator("h3").inner_text()
    page.keyboard.press("End")
    assert page.locator("dialog input").evaluate("(element) => element.value") == "100"
    page.keyboard.press("Escape")

    assert not page.locator("dialog").is_visible()
    assert cards.nth(1).locator("input").evaluate("(element) => element === document.activeElement")


@pytest.mark.parametrize("size", SIZES)
def test_the_enlarged_picture_and_its_annotations_fit_the_screen(size, opened):
    page = opened(size=size)
    page.locator(".round .enlarge").first.click(force=True)

    box = page.locator("dialog").bounding_box()

    width, height = SIZES[size]
    assert 0 <= box["x"] < box["x"] + box["width"] <= width
    assert 0 <= box["y"] < box["y"] + box["height"] <= height
    page.locator("dialog .close").click()
    assert not page.locator("dialog").is_visible()


def test_boxes_and_prompts_are_shown_on_demand(opened):
    page = opened()
    card = page.locator(".round .card").first
    assert not card.locator(".boxes").is_visible()

    card.locator("summary").click()
    assert card.locator(".boxes").is_visible()
    assert card.locator(".annotations ol").is_visible()
    card.locator("input").focus()
    page.keyboard.press("w")
    assert not card.locator(".boxes").is_visible()

    page.get_by_role("button", name="Boxes and prompts").click()
    assert page.locator(".round > .grid .boxes:visible").count() == 12
    page.get_by_role("button", name="Boxes and prompts", pressed=True).click()
    assert page.locator(".round > .grid .boxes:visible").count() == 0


def test_another_candidate_can_be_shown_in_the_right_half(opened):
    page = opened()
    card = page.locator("#pictures .card").first
    assert "vivid and lit" in card.locator(".names").inner_text()
    shown = card.locator("img[data-arm]:visible").get_attribute("src")

    page.get_by_label("vivid", exact=True).check(force=True)

    assert "vivid and lit" not in card.locator(".names").inner_text()
    assert card.locator("img[data-arm]:visible").count() == 1
    assert card.locator("img[data-arm]:visible").get_attribute("src") != shown


def test_no_number_is_cut_or_lies_over_the_next_however_many_decimals_it_has(opened, tmp_path):
    faint = aa.compare(
        Renderer(),
        {"vivid": Renderer(", vivid")},
        playground.prompts(8, seed=0, held_out=True),
        scorers=[FaintChroma()],
        progress=False,
    )
    (row,) = faint.rows
    assert row.decimals >= 6
    page = opened(path=write_report(tmp_path / "faint.html", comparison=faint))
    widths = page.evaluate(
        """() => [...document.querySelectorAll(".row:not(.head) > span, .interval small")].map((cell) => {
            const text = document.createRange();
            text.selectNodeContents(cell);
            return [cell.className || "interval", text.getBoundingClientRect().width, cell.getBoundingClientRect().width];
        })"""
    )
    assert len(widths) == 9
    assert [name for name, text, cell in widths if text > cell + 0.5] == []
    lines = page.evaluate("""() => [...document.querySelectorAll(".row:not(.head) .number")].map((cell) => {
        const text = document.createRange();
        text.selectNodeContents(cell);
        return new Set([...text.getClientRects()].map((box) => box.top)).size;
    })""")
    assert set(lines) == {1}


def test_every_element_with_a_role_has_a_name(opened):
    page = opened()
    tree = page.locator("body").aria_snapshot()

    nameless = [line for line in tree.splitlines() if line.strip() in {"- slider", "- button", "- img", "- radio"}]

    assert nameless == []
    assert tree.count('slider "Before and after: ') == 8 + 12


def test_printed_pictures_are_side_by_side(opened):
    page = opened()
    page.emulate_media(media="print")
    slider = page.locator("main .slider").first

    before, after = (
        slider.locator(selector).first.bounding_box() for selector in (".before img", "img[data-arm]:not([hidden])")
    )

    assert after["x"] >= before["x"] + before["width"]
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("name", ["inline", "folder"])
def test_a_foreign_script_does_not_run(name, opened, pages):
    foreign = pages[name].with_name(f"{name}_foreign.html")
    text = pages[name].read_text(encoding="utf-8")
    foreign.write_text(text.replace("</main>", "<script>document.title = 'taken'</script></main>"), encoding="utf-8")

    page = opened(path=foreign)

    assert page.title() != "taken"
    assert "Content Security Policy" in " ".join(opened.problems)  # so the empty list in other tests is evidence
    opened.problems.clear()
