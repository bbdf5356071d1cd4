"""Make the documentation's picture of the sandbox's page: ``make screenshot``."""

from __future__ import annotations

import sys
from pathlib import Path

from chromium import Chromium
from selenium.webdriver.common.keys import Keys
from shown import fill

from openmeter_wsgi.sandbox import Sandbox
from test_sandbox_support import Api

WIDTH, HEIGHT = 1200, 540
EVENTS = 2_000


def main(target: Path) -> None:
    """Write a picture of a meter, with the figures of one column, to *target*."""
    with Sandbox() as sandbox, Api(sandbox.url) as api:
        fill(sandbox, api, EVENTS)
        with Chromium(WIDTH, HEIGHT) as browser:
            browser.open(sandbox.url)
            browser.find(".meter:nth-child(3) .groups canvas")
            browser.find(".plot").send_keys(Keys.ARROW_LEFT * 20)
            browser.execute_script("document.querySelector('.meter').scrollIntoView()")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(browser.get_screenshot_as_png())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
