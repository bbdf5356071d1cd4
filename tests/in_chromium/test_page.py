"""The sandbox's page in a browser: its contents, and the escaping of texts."""

import time

import pytest

from openmeter_wsgi.sandbox import Sandbox
from openmeter_wsgi.sandbox.request_validation import rfc3339
from test_sandbox_page import HOSTILE
from test_sandbox_support import Api, event

ROWS = (
    "return [...arrivals.tBodies[0].rows]"
    ".map((row) => row.cells[arguments[0]].textContent)"
)
OUTCOME, ID = 1, 4
# For each swatch, its pixels as 1 or 0: with the colour of its corner, or another.
SHAPES = """
return [...document.querySelector(".meter").querySelectorAll(".groups canvas")]
  .map((canvas) => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, 16, 14);
    const pixels = Array.from({ length: 16 * 14 }, (_, at) =>
      data.slice(4 * at, 4 * at + 3).join());
    return pixels.map((pixel) => Number(pixel === pixels.at(-1))).join("");
  });
"""


def rows(browser, column=ID):
    return browser.execute_script(ROWS, column)


def search(browser, **wanted):
    for name, value in wanted.items():
        browser.execute_script(
            "const field = document.querySelector(`#search [name=${arguments[0]}]`);"
            "field.value = arguments[1];"
            "field.dispatchEvent(new Event('input', { bubbles: true }))",
            name,
            value,
        )


def shows(browser, *ids):
    browser.until(
        f"{ROWS.replace('return', 'const shown =')};"
        "return JSON.stringify(shown) === JSON.stringify(arguments[1])",
        ID,
        list(ids),
    )


def test_the_page_loads_nothing_but_its_own_files(browser, filled):
    browser.open(filled.url)
    for view in ("events", "access", "faults"):
        browser.go(view)

    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map(({ name }) => name)"
    )

    assert len(loaded) > 10
    assert [name for name in loaded if not name.startswith(f"{filled.url}/")] == []


def test_no_script_can_turn_a_text_into_markup(browser, sandbox):
    browser.open(sandbox.url)

    error = browser.execute_script(
        "try { document.createElement('p').innerHTML = '<img>'; return 'it can'; }"
        "catch (error) { return error.name; }"
    )

    assert error == "TypeError"
    assert "TrustedHTML" in browser.console()[0]


@pytest.mark.parametrize("view", ["usage", "events", "access"])
def test_hostile_names_and_data_are_shown_as_they_are(browser, sandbox, api, view):
    api.meter("calls", "COUNT", eventType=HOSTILE[0], name=HOSTILE[0])
    for number, hostile in enumerate(HOSTILE):
        texts = {
            "id": f"{number}{hostile}",
            "subject": hostile,
            "data": {hostile: hostile},
        }
        api.ingest(event(**texts, type=HOSTILE[0]))
        api.ingest(event(**texts, specversion=hostile))
        sandbox.grant(hostile, "sso")

    browser.open(sandbox.url, view)
    browser.find(f"[data-view={view}] tbody tr:nth-child({len(HOSTILE)})")

    shown = browser.text(f"[data-view={view}]")
    assert [hostile for hostile in HOSTILE if hostile not in shown] == []
    assert browser.execute_script("return document.images.length") == 0


def test_events_are_found_by_what_they_hold_and_by_what_became_of_them(browser, filled):
    browser.open(filled.url, "events")
    browser.until("return arrivals.tBodies[0].rows.length === 100")

    search(browser, search="pixels")
    shows(browser, "event-image")
    search(browser, search="", outcome="refused")
    shows(browser, "not an event", "event-without a subject", "event-fine")
    assert "event 2 of 2" in rows(browser, OUTCOME)[1]
    assert "minimum string length is 1" in rows(browser, OUTCOME)[1]
    assert "together with event 2 of its batch" in rows(browser, OUTCOME)[2]
    search(browser, outcome="uncounted")
    shows(browser, "event-no tokens", "event-image")
    search(browser, outcome="", subject="oscorp", type="completion")
    browser.until("return arrivals.tBodies[0].rows.length < 20")
    browser.find("[type=reset]").click()
    browser.until("return arrivals.tBodies[0].rows.length === 100")


def test_the_counts_lead_to_the_events_they_count(browser, filled):
    browser.open(filled.url)

    browser.find("#counts a[href='#events?outcome=duplicate']").click()

    browser.until("return arrivals.tBodies[0].rows.length === 3")
    assert all("duplicate" in outcome for outcome in rows(browser, OUTCOME))
    assert browser.find("[name=outcome]").get_property("value") == "duplicate"


def trace(browser, id_, outcome):
    search(browser, search=id_, outcome=outcome)
    shows(browser, id_)
    if outcome != "stored":
        browser.until(f"{ROWS}[0].includes(arguments[1])", OUTCOME, outcome)
    browser.find("#arrivals tbody button").click()
    browser.until("return document.querySelector('#trace').open")
    text = browser.text("#trace")
    browser.find("#trace-close").click()
    return text


def test_a_trace_tells_why_an_event_is_counted_or_not(browser, filled):
    browser.open(filled.url, "events")
    request = "01000001:request"

    counted = trace(browser, request, "stored")
    duplicate = trace(browser, request, "duplicate")
    lame = trace(browser, "event-no tokens", "stored")
    refused = trace(browser, "event-without a subject", "refused")
    alone = trace(browser, "event-image", "stored")

    assert "Requests COUNT✓ yes1route = /v1/" in counted
    assert "Latency AVG of $.seconds✓ yes0." in counted
    assert "Duplicate of the event that arrived at" in duplicate
    assert "not stored" in duplicate
    assert "Event 2 of the 2 in its request. answered 400" in refused
    assert 'no: invalid event: missing value property: "$.tokens"' in lame
    assert "No meter counts events of type image.generated" in alone


def test_events_arrive_while_one_looks_unless_one_has_paused(browser, sandbox, api):
    browser.open(sandbox.url, "events")
    api.ingest(event(1))
    shows(browser, "event-1")
    api.ingest(event(2))
    shows(browser, "event-2", "event-1")

    browser.find("#pause").click()
    api.ingest([event(3), event(4)])
    browser.until("return pause.textContent === 'Resume: 2 new events'")
    assert rows(browser) == ["event-2", "event-1"]
    browser.find("#pause").click()

    shows(browser, "event-4", "event-3", "event-2", "event-1")


def test_a_meter_made_by_a_button_counts_what_had_not_been_counted(
    browser, sandbox, api
):
    api.ingest(event(type="image", data={"pixels": 5}))
    browser.open(sandbox.url, "events")
    browser.until("return arrivals.textContent.includes('no meter found')")

    browser.go("usage")
    browser.find("#uncounted button:last-child").click()
    browser.until(
        "return document.querySelector('.total')?.textContent.startsWith('5 ')"
    )

    browser.go("events")
    browser.until("return arrivals.textContent.includes('counted')")


def test_usage_is_divided_as_one_chooses(browser, filled):
    browser.open(filled.url)
    browser.find(".meter select option[value=status]")

    browser.find(".meter select").send_keys("status")
    browser.until("return document.querySelector('.meter th').textContent === 'status'")
    names = "[...document.querySelector('.meter').querySelectorAll('.groups tbody th')]"
    browser.until(
        f"return {names}.map((name) => name.textContent).join() === '200,404'"
    )
    swatches = browser.execute_script(
        f"return {names}.map((name) => name.querySelector('canvas').toDataURL())"
    )

    assert len(set(swatches)) == 2


def test_looks_differ_without_colours(browser, filled):
    browser.open(filled.url)
    browser.find(".meter .groups canvas")

    shapes = browser.execute_script(SHAPES)

    assert len(shapes) == 8
    assert len(set(shapes)) == 8


def background(browser):
    return browser.execute_script(
        "return getComputedStyle(document.body).backgroundColor"
    )


def test_colours_follow_the_system_until_they_are_chosen_and_are_remembered(
    browser, filled
):
    browser.open(filled.url)
    light = background(browser)
    browser.prefer(dark=True)
    dark = background(browser)
    browser.find("#theme option[value=light]").click()
    chosen = background(browser)
    browser.open(filled.url)
    remembered = background(browser), browser.find("#theme").get_property("value")
    browser.find("#theme option[value='']").click()

    assert light != dark
    assert chosen == light
    assert remembered == (light, "light")
    assert background(browser) == dark


def test_the_page_says_that_the_sandbox_is_gone(browser):
    with Sandbox() as sandbox:
        browser.open(sandbox.url)
    browser.until("return document.querySelector('#status').className === 'lost'")

    assert browser.text("#status") == "The sandbox does not answer; trying again"
    browser.get("about:blank")
    assert all("ERR_" in message for message in browser.console())


def test_a_lag_is_set_and_what_waits_is_named(browser, sandbox, api):
    api.meter("calls", "COUNT")
    api.ingest(event(1))
    browser.open(sandbox.url, "faults")
    set_field(browser, "[name=visibleAfter]", "3600")
    browser.until("return wrong.textContent === 'Simulated: usage lags by 3,600 s'")

    api.ingest([event(2), event(3)])
    browser.go("usage")
    browser.until("return counts.textContent.includes('2 not visible yet (lag)')")
    during = browser.text(".meter .total")
    browser.go("faults")
    browser.find("#all-right").click()
    browser.until("return wrong.textContent === ''")
    browser.go("usage")
    browser.until(
        "return document.querySelector('.meter .total').textContent.startsWith('3 ')"
    )

    assert during == "1 from 1 event"
    assert sandbox.store.visible_after == 0


def set_field(browser, selector, value):
    browser.execute_script(
        "const field = document.querySelector(arguments[0]);"
        "if (field.type === 'checkbox') field.checked = arguments[1];"
        "else field.value = arguments[1];"
        "field.dispatchEvent(new Event('change', { bubbles: true }))",
        selector,
        value,
    )


@pytest.mark.parametrize(
    ("field", "value", "message", "status"),
    [
        ("denied", "403", "ingest answered 403", 403),
        ("refusedType", "call", "400 for type call", 400),
        ("refusedSubject", "customer", "400 for subject customer", 400),
        ("retryAfter", "7", "ingest answered 429", 429),
        ("outage", True, "outage of ingest", 503),
        ("claim", True, "ids claimed, events not stored", 500),
        ("forget", True, "events forgotten", 204),
        ("byteDelay", "0.001", "ingest answered byte by byte", 204),
    ],
)
def test_a_fault_is_set_named_and_stopped(
    browser, sandbox, api, field, value, message, status
):
    browser.open(sandbox.url, "faults")

    set_field(browser, f"[data-group=ingest] [name={field}]", value)
    browser.until("return wrong.textContent === arguments[0]", f"Simulated: {message}")
    during = api.ingest(event(1)).status_code
    browser.find("#all-right").click()
    browser.until("return wrong.textContent === ''")

    assert during == status
    assert api.ingest(event(2)).status_code == 204


def test_back_closes_what_is_told_of_an_event_and_nothing_else(browser, sandbox, api):
    api.ingest(event(1))
    browser.open(sandbox.url)
    browser.go("events")
    for close in ("back", "button"):
        browser.find("#arrivals tbody button").click()
        browser.until("return document.querySelector('#trace').open")
        if close == "back":
            browser.back()
        else:
            browser.find("#trace-close").click()
        browser.until("return !document.querySelector('#trace').open")
        browser.until("return !history.state?.trace")
        assert browser.current_url.endswith("#events")

    browser.back()
    browser.until("return location.hash === '#usage'")


def test_a_narrow_window_shows_each_event_whole(browser, sandbox, api):
    browser.resize(390, 844)
    api.ingest(event(1, type="prompt", subject="acme", data={"tokens": 4711}))
    browser.open(sandbox.url, "events")
    browser.find("#arrivals tbody tr")

    shown = browser.execute_script(
        "const cells = [...document.querySelectorAll('#arrivals tbody tr > *')];"
        "return cells.map((cell) => {"
        " const { left, right } = cell.getBoundingClientRect();"
        " const isInside = left >= 0 && right <= innerWidth;"
        " return [cell.dataset.label, cell.textContent, isInside]; })"
    )

    assert {label: text for label, text, _ in shown}.items() >= {
        "Type": "prompt", "Subject": "acme", "Data": '{"tokens":4711}', "Id": "event-1",
    }.items()  # fmt: skip
    assert all(inside for *_, inside in shown)


def test_the_time_span_fits_the_data_until_one_is_chosen(browser, sandbox, api):
    api.meter("calls", "COUNT")
    api.ingest(event(1, time=rfc3339(time.time() - 120)))
    browser.open(sandbox.url)
    legend = "document.querySelector('.meter .groups').textContent"
    last = f"return {legend}.includes(arguments[0])"
    browser.until(last, "Last 5 minutes")

    api.ingest(event(2, time=rfc3339(time.time() - 7200)))
    browser.until(last, "Last day")
    set_field(browser, "#span", "3600")
    browser.until(last, "Last hour")
    api.ingest(event(3, time=rfc3339(time.time() - 2 * 86400)))
    browser.until("return counts.textContent.includes('Stored3')")

    assert browser.execute_script(last, "Last hour")


def test_counts_that_differ_say_why(browser, tmp_path, sandbox):
    for number in (1, 2):
        with Sandbox(database=tmp_path / "usage.sqlite") as kept, Api(kept.url) as api:
            if number == 1:
                api.meter("calls", "COUNT")
            api.ingest([event(f"{number}-{n}") for n in range(3)])
            if number == 2:
                browser.open(kept.url)
                browser.find(".meter .total")
                counts = browser.text("#counts")
                total = browser.text(".meter .total")
                browser.open(sandbox.url)

    assert "Received3since the start, in 1 request" in counts
    assert "Stored63 of them in earlier runs" in counts
    assert total == "6 from 6 events of all runs"


def test_the_events_of_a_check_are_not_offered_as_meters(browser, sandbox, api):
    api.ingest([event(1, type="openmeter_wsgi.check"), event(2, type="prompt")])

    browser.open(sandbox.url)
    browser.find("#uncounted li")

    assert browser.execute_script(
        "return [...document.querySelectorAll('#uncounted strong')]"
        ".map((name) => name.textContent)"
    ) == ["prompt"]
