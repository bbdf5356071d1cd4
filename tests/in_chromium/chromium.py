"""A real browser with the sandbox's page, looked at and used as a person would."""

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
    # Tests of a container run as root, whom Chromium serves only so.
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--force-device-scale-factor=1",
    # Nothing outside this machine has an address.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
LONG_TASKS = """
window.longTasks = [];
new PerformanceObserver((list) => {
  for (const { duration } of list.getEntries()) longTasks.push(duration);
}).observe({ type: "longtask", buffered: true });
"""


class Chromium(webdriver.Chrome):
    """One window, of one size, in dark or light."""

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
        """Load the page anew, and wait until it has shown something."""
        self.get("about:blank")
        self.get(f"{url}/#{view}")
        self.until("return document.querySelector('#status').className === 'live'")

    def go(self, view: str) -> None:
        """Change to another view, as its link does."""
        self.find(f"nav a[href='#{view}']").click()
        self.until(f"return !document.querySelector('[data-view={view}]').hidden")

    def find(self, selector: str) -> Any:
        """Return the first element that is there, waiting for it."""
        return self.until(f"return document.querySelector({selector!r})")

    def text(self, selector: str) -> str:
        return str(self.find(selector).get_property("textContent"))

    def until(self, script: str, *arguments: Any) -> Any:
        """Return what *script* returns as soon as that is true."""
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
        """Yield what axe finds wrong with the page as it stands."""
        source = files("axe_playwright_python").joinpath("axe.min.js").read_text()
        self.execute_script(source)
        found = self.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            "axe.run(document).then(done, (error) => done({error: String(error)}))"
        )
        assert "error" not in found, found
        assert len(found["passes"]) > 10
        for violation in found["violations"]:
            for node in violation["nodes"]:
                yield f"{violation['impact']}: {violation['id']}: {node['html'][:200]}"

    def complaints(self) -> list[str]:
        """Return what the page wrote to the console since the last call."""
        return [entry["message"] for entry in self.get_log("browser")]
