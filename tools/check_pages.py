"""Opens HTML pages in Chromium, wide and narrow, light and dark, and names what axe-core finds serious and what scrolls sideways.

Run ``npm pack axe-core@4``, unpack it, and then, for a build of the documentation and a report (or the address of a review)::

    python tools/check_pages.py --axe package/axe.min.js docs/_build/html/*.html runs/quickstart/report.html

It ends with 1 if there is a finding. axe-core (MPL-2.0) is a tool of this check alone.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from playwright.sync_api import Page, sync_playwright

WIDTHS_PX = {"desktop": 1280, "phone": 390}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
SERIOUS = ("serious", "critical")
RULES = """async () => (await axe.run({resultTypes: ["violations"]})).violations.map(found => ({
    rule: found.id, impact: found.impact, help: found.help, count: found.nodes.length, example: found.nodes[0].html}))"""


def findings(page: Page, axe: Path) -> Iterator[str]:
    """What is wrong with the open page, a line each."""
    width, needed = page.evaluate("[window.innerWidth, document.documentElement.scrollWidth]")
    if needed > width:
        yield f"scrolls sideways: {needed} px in a window of {width}"
    page.add_script_tag(path=axe)
    for found in page.evaluate(RULES):
        if found["impact"] in SERIOUS:
            example = " ".join(found["example"].split())[:160]
            yield f"{found['impact']}: {found['rule']}, {found['count']} times: {found['help']}: {example}"


def main() -> None:
    """Check every page in every window and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axe", type=Path, required=True, help="axe.min.js of the npm package axe-core")
    parser.add_argument("pages", nargs="+", help="files of HTML, or addresses")
    arguments = parser.parse_args()
    count = 0
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for size, width in WIDTHS_PX.items():
            for scheme in SCHEMES:
                context = browser.new_context(
                    viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True
                )
                for address in arguments.pages:
                    page = context.new_page()
                    page.goto(address if "://" in address else Path(address).resolve().as_uri())
                    for line in findings(page, arguments.axe):
                        count += 1
                        print(f"{address} ({size}, {scheme}): {line}")
                    page.close()
                context.close()
        browser.close()
    print(f"{len(arguments.pages)} pages in {len(WIDTHS_PX) * len(SCHEMES)} windows each: {count} findings")
    sys.exit(bool(count))


if __name__ == "__main__":
    main()
