"""Chromium with the sandbox's page, used as a person would use it."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 40
VIEWS = ("usage", "events", "access", "faults")
ARGUMENTS = (
    "--headless=new",
    # Tests in a container run as root, for which Chromium needs this flag.
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--force-device-scale-factor=1",
    # Block all addresses outside this machine.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
LONG_TASKS = """
window.longTasks = [];
new PerformanceObserver((list) => {
  for (const { duration } of list.getEntries()) longTasks.push(duration);
}).observe({ type: "longtask", buffered: true });
"""


class Chromium(webdriver.Chrome):
    """A browser window with a given size and colour scheme."""

    def __init__(self, width: int = 1400, height: int = 900, *, dark: bool = False):
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for argument in (*ARGUMENTS, f"--window-size={width},{height}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        super().__init__(options, Service("/usr/bin/chromedriver"))
        self.execute_cdp_cmd(
            "Page.addScriptToEvaluateOnNewDocument", {"source": LONG_TASKS}
        )
        self.resize(width, height)
        self.prefer(dark=dark)

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", metrics | {"mobile": False}
        )

    def prefer(self, *, dark: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [feature, still]}
        )

    def open(self, url: str, view: str = "usage") -> None:
        """Reload the page and wait until it is live."""
        self.get("about:blank")
        self.get(f"{url}/#{view}")
        self.until("return document.querySelector('#status').className === 'live'")

    def go(self, view: str) -> None:
        """Click the link to another view."""
        self.find(f"nav a[href='#{view}']").click()
        self.until(f"return !document.querySelector('[data-view={view}]').hidden")

    def find(self, selector: str) -> Any:
        """Wait for an element and return the first one."""
        return self.until(f"return document.querySelector({selector!r})")

    def text(self, selector: str) -> str:
        return str(self.find(selector).get_property("textContent"))

    def until(self, script: str, *arguments: Any) -> Any:
        """Run *script* until its result is true, and return the result."""
        return WebDriverWait(self, PATIENCE, poll_frequency=0.05).until(
            lambda _: self.execute_script(script, *arguments), script
        )

    def press(self, *keys: str) -> None:
        ActionChains(self, duration=0).send_keys(*keys).perform()

    def tab(self, *, back: bool = False) -> None:
        keys = ActionChains(self, duration=0)
        if back:
            keys.key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
        else:
            keys.send_keys(Keys.TAB).perform()

    def violations(self) -> Iterator[str]:
        """Yield the violations that axe finds in the current page."""
        source = files("axe_playwright_python").joinpath("axe.min.js").read_text()
        self.execute_script(source)
        report = self.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            "axe.run(document).then(done, (error) => done({error: String(error)}))"
        )
        assert "error" not in report, report
        assert len(report["passes"]) > 10
        for violation in report["violations"]:
            for node in violation["nodes"]:
                yield f"{violation['impact']}: {violation['id']}: {node['html'][:200]}"

    def console(self) -> list[str]:
        """Return the messages of the console since the last call."""
        return [entry["message"] for entry in self.get_log("browser")]
