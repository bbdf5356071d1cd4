"""Speed of the page with ten thousand events: no task blocks it for long."""

import pytest
from shown import fill, make_events

EVENTS = 10_000
#: Maximum number of milliseconds of a task.
LONGEST = 200
#: Number of attempts: a busy machine makes some tasks long, but not in every attempt.
ATTEMPTS = 3


@pytest.mark.timeout(300)
def test_no_task_is_long_with_ten_thousand_events(browser, sandbox, api):
    fill(sandbox, api, EVENTS)

    for attempt in range(ATTEMPTS):
        long = work(browser, sandbox, api, attempt)
        if max(long, default=0) <= LONGEST:
            return

    raise AssertionError(f"tasks of more than {LONGEST} ms, every time: {long}")


def work(browser, sandbox, api, attempt):
    """Use the page while events arrive, and return the times of its long tasks."""
    browser.open(sandbox.url)
    browser.find(".meter:nth-child(3) canvas")
    browser.execute_script(
        "document.querySelector('.meter select').value = 'route';"
        "document.querySelector('.meter select').dispatchEvent(new Event('change'))"
    )
    browser.until("return document.querySelector('.meter th').textContent === 'route'")
    browser.go("events")
    browser.find("#arrivals tbody tr")
    for rows in range(200, 1001, 100):
        browser.execute_script("older.click()")
        browser.until("return arrivals.tBodies[0].rows.length === arguments[0]", rows)
    for letter in "completion large":
        browser.find("[name=search]").send_keys(letter)
    browser.until("return found.textContent.endsWith('events found')")
    browser.find("[type=reset]").click()
    browser.until("return arrivals.tBodies[0].rows.length === 100")
    for batch in range(3):
        prefix = f"live-{attempt}-{batch}-"
        api.ingest(list(make_events(500, prefix=prefix)))
        browser.until(
            "return arrivals.tBodies[0].rows[0].textContent.includes(arguments[0])",
            prefix,
        )
    return browser.execute_script("return longTasks")
