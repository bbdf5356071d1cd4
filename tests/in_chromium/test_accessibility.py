"""Accessibility of every view, dark and light: checks of axe, and of the keyboard."""

import pytest
from chromium import VIEWS
from selenium.webdriver.common.keys import Keys
from shown import make_events

TAB_STOPS = 90
# The element with the focus; the booleans tell if a person can see it.
FOCUS = """
const focused = document.activeElement;
const { top, bottom, left, right } = focused.getBoundingClientRect();
const { outlineStyle, outlineWidth } = getComputedStyle(focused);
return {
  name: focused.outerHTML.slice(0, 120),
  matches: focused.matches(arguments[0]),
  isMarked: outlineStyle !== "none" && parseFloat(outlineWidth) >= 1,
  isInSight: top < innerHeight && bottom > 0 && left < innerWidth && right > 0,
};
"""
LIVE_REGIONS = """
window.announced = [];
const regions = "[role=status], [role=alert], [aria-live]";
for (const region of document.querySelectorAll(regions)) {
  new MutationObserver(() => announced.push(region.id + ": " + region.textContent))
    .observe(region, { childList: true, characterData: true, subtree: true });
}
"""


def open_everything(browser, view):
    if view == "usage":
        browser.find(".meter details summary").click()
        browser.until(
            "return document.querySelectorAll('.meter details tr').length > 60"
        )
    if view == "events":
        browser.find("#arrivals tbody tr")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_wrong_with_any_view(browser, varied, dark, width):
    browser.prefer(dark=dark)
    browser.resize(width, 900)
    browser.open(varied.url)

    found = {}
    for view in VIEWS:
        browser.go(view)
        open_everything(browser, view)
        found[view] = list(browser.violations())
    browser.go("events")
    browser.find("#arrivals tbody button").click()
    browser.find("#trace[open] table, #trace[open] #trace-meters p")
    found["trace"] = list(browser.violations())

    assert found == {view: [] for view in (*VIEWS, "trace")}


@pytest.mark.timeout(180)
def test_axe_finds_nothing_wrong_with_an_empty_sandbox(browser, sandbox):
    browser.open(sandbox.url)
    browser.find("#empty:not([hidden])")

    found = {}
    for view in VIEWS:
        browser.go(view)
        found[view] = list(browser.violations())

    assert found == {view: [] for view in VIEWS}


@pytest.mark.timeout(180)
def test_the_chosen_colours_satisfy_axe_whatever_the_system_prefers(browser, varied):
    browser.prefer(dark=True)
    browser.open(varied.url)
    for theme in ("light", "dark"):
        browser.execute_script(
            "theme.value = arguments[0]; theme.dispatchEvent(new Event('change'))",
            theme,
        )
        assert list(browser.violations()) == []


@pytest.mark.parametrize("width", [1400, 390])
def test_no_view_is_wider_than_the_window(browser, filled, width):
    browser.resize(width, 900)
    browser.open(filled.url)

    for view in VIEWS:
        browser.go(view)
        open_everything(browser, view)
        wide = "return document.documentElement.scrollWidth"
        assert (view, browser.execute_script(wide)) == (
            view,
            width - scrollbar(browser),
        )


def scrollbar(browser):
    return browser.execute_script(
        "return innerWidth - document.documentElement.clientWidth"
    )


def tab_to(browser, selector, *, back=False):
    """Press Tab until *selector* has the focus; every stop must be visible."""
    for _ in range(TAB_STOPS):
        browser.tab(back=back)
        focus = browser.execute_script(FOCUS, selector)
        if focus["name"].startswith("<body"):
            continue  # the focus left the page after its last stop
        assert focus["isMarked"], f"no visible focus: {focus['name']}"
        assert focus["isInSight"], f"out of sight: {focus['name']}"
        if focus["matches"]:
            return
    raise AssertionError(f"not reached by keyboard: {selector}")


def focused(browser):
    return browser.execute_script("return document.activeElement.id")


def test_everything_can_be_reached_and_used_by_keyboard_alone(browser, filled):
    browser.open(filled.url)
    browser.find(".meter canvas")

    tab_to(browser, ".skip")
    browser.press(Keys.ENTER)
    assert focused(browser) == "content"
    tab_to(browser, "#span")
    tab_to(browser, ".plot")
    slider = "return document.activeElement.getAttribute('aria-valuetext')"
    last = browser.execute_script(slider)
    browser.press(Keys.HOME)
    first = browser.execute_script(slider)
    browser.press(Keys.ARROW_RIGHT)
    assert len({last, first, browser.execute_script(slider)}) == 3
    assert browser.find(".readout").is_displayed()
    browser.press(Keys.ESCAPE)
    assert not browser.find(".readout").is_displayed()
    tab_to(browser, ".meter summary")

    tab_to(browser, "nav a[href='#events']", back=True)
    browser.press(Keys.ENTER)
    browser.until("return document.activeElement.id === 'events-title'")
    assert browser.title == "Events · OpenMeter sandbox"

    tab_to(browser, "[name=search]")
    browser.press("no tokens")
    browser.until("return arrivals.tBodies[0].rows.length === 1")
    browser.until("return found.textContent === '1 event found'")
    tab_to(browser, "#arrivals tbody button")
    browser.press(Keys.ENTER)
    browser.until("return document.querySelector('#trace').open")
    assert focused(browser) == "trace-close"
    assert "Trace of event-no tokens" in browser.text("#trace")
    tab_to(browser, "#trace pre")
    browser.press(Keys.ESCAPE)
    browser.until("return document.activeElement.matches('#arrivals tbody button')")


def test_access_and_faults_can_be_set_by_keyboard_alone(browser, filled):
    browser.open(filled.url, "access")
    tab_to(browser, "[name=customer]")
    browser.press("wayne")
    tab_to(browser, "[name=feature]")
    browser.press("requests")
    tab_to(browser, "[name=amount]")
    browser.press("7", Keys.ENTER)
    browser.until("return document.querySelector('#grant output').textContent !== ''")
    assert filled.value("wayne", "requests")["balance"] == 7

    tab_to(browser, "nav a[href='#faults']", back=True)
    browser.press(Keys.ENTER)
    browser.until("return document.activeElement.id === 'faults-title'")
    tab_to(browser, "[name=outage]")
    browser.press(Keys.SPACE)
    browser.until("return wrong.textContent.includes('outage of ingest')")
    assert filled.faults.ingest.settings.outage


def test_live_events_do_not_chatter_and_a_search_is_announced_once(
    browser, filled, api
):
    browser.open(filled.url, "events")
    browser.find("#arrivals tbody tr")
    browser.execute_script(LIVE_REGIONS)

    for number in range(3):
        api.ingest(list(make_events(5, prefix=f"live-{number}-")))
        browser.until(
            "return arrivals.tBodies[0].rows[0].textContent.includes(arguments[0])",
            f"live-{number}-",
        )
    silent = browser.execute_script("return announced")
    browser.find("[name=search]").send_keys("live-1-")
    browser.until("return announced.length > 0")
    heard = browser.execute_script("return announced")

    assert (silent, heard) == ([], ["found: 5 events found"])
