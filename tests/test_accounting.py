"""The counters add up after every fault: each settled request is accounted for."""

import functools
import http.client
import operator
import os
import random
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec.structs import replace

from accounting import ENDINGS, left_behind
from openmeter_server import RESET, TAKEN_BUT_RESET, Answer, Request, problem
from openmeter_wsgi import OpenMeterMiddleware, Stats
from servers import GUNICORN, TIMEOUT, Server

RECYCLING = [
    *GUNICORN, "--worker-class", "gthread", "--threads", "2", "--workers", "2",
    "--max-requests", "120", "--max-requests-jitter", "20",
    "--graceful-timeout", "10",
]  # fmt: skip


class Clients:
    """Clients that send random requests, four at a time, and count the answers."""

    def __init__(self, address: tuple[str, int], chance: random.Random) -> None:
        self._address = address
        self._chance = chance
        self.answered = 0
        self.unknown = 0

    def ask(self, times: int) -> None:
        requests = [
            (path, "poison" if n % 15 == 0 else f"customer-{n % 7}")
            for n, path in enumerate(self._chance.choices(ENDINGS, k=times))
        ]
        with ThreadPoolExecutor(4) as threads:
            answered = sum(threads.map(self._once, requests))
        self.answered += answered
        self.unknown += times - answered

    def _once(self, request: tuple[str, str]) -> bool:
        path, subject = request
        connection = http.client.HTTPConnection(*self._address, timeout=TIMEOUT)
        try:
            headers = {} if path == "/nobody" else {"X-Subject": subject}
            connection.request("GET", path, headers=headers)
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False  # a worker that ended may have settled it or not
        else:
            return True
        finally:
            connection.close()


FAILURES = [
    Answer(503), RESET, TAKEN_BUT_RESET, problem(401), Answer(429), Answer(500),
]  # fmt: skip


def children(pid: int) -> list[int]:
    return [
        int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]


def chaos(openmeter, server: Server, clients: Clients, chance: random.Random) -> None:
    """Let OpenMeter fail in every way, and end workers as a deployment does."""
    openmeter.poison = {"poison"}
    openmeter.rule = lambda _: chance.choice([*FAILURES, *[None] * 14])
    clients.ask(160)
    openmeter.wait_for(10)
    openmeter.down()
    clients.ask(60)
    os.kill(children(server.process.pid)[0], signal.SIGTERM)
    clients.ask(60)
    openmeter.up()
    openmeter.rule = None
    before = len(openmeter.ids)
    for worker in children(
        server.process.pid
    ):  # each sends its waiting events when it ends
        os.kill(worker, signal.SIGTERM)
    healthy_since = len(openmeter.requests)
    clients.ask(100)
    openmeter.wait_for(before + 10)
    while not is_one_buried(openmeter.requests[healthy_since:]):
        clients.ask(10)
    openmeter.rule = lambda _: Answer(503)
    clients.ask(20)


def is_one_buried(requests: list[Request]) -> bool:
    """Return True if an event was refused in a batch and, after others, again alone.

    Each connection belongs to one sender.
    """
    taken: Counter[int] = Counter()
    refused_at: dict[tuple[int, str], int] = {}
    for request in requests:
        sender = request.connection
        if "poison" not in request.subjects:
            taken[sender] += 1
            continue
        for id_ in request.ids:
            first = refused_at.setdefault((sender, id_), taken[sender])
            if len(request.ids) == 1 and first < taken[sender]:
                return True
    return False


def account(openmeter, tmp_path: Path, **env: str) -> tuple[Stats, Clients]:
    accounts = str(tmp_path / "accounts")
    variables = {"OPENMETER_API_URL": openmeter.url, "ACCOUNTS": accounts, **env}
    chance = random.Random(7)
    with Server(
        RECYCLING, "accounting:application", tmp_path / "log", **variables
    ) as server:
        clients = Clients(server.address, chance)
        chaos(openmeter, server, clients, chance)
        assert server.stop() == 0
    processes = left_behind(accounts)
    assert len(processes) > 3, "some came after others"
    return functools.reduce(operator.add, processes), clients


def assert_adds_up(total: Stats, clients: Clients) -> None:
    assert clients.answered > 360
    assert clients.answered <= total.settled <= clients.answered + clients.unknown
    assert total.settled == total.metered + sum(total.not_metered.values())
    assert total.not_metered.keys() == {"status", "no_usage", "no_subject"}
    assert (
        total.events
        == total.delivered + total.waiting + total.dead_lettered + total.lost
    )
    assert total.unaccounted == 0
    assert total.delivered > 0
    assert total.dead_lettered > 0
    assert total.waiting > 0
    assert total.retries > 0


@pytest.mark.load
def test_all_that_was_settled_is_accounted_for_in_memory(openmeter, tmp_path):
    total, clients = account(openmeter, tmp_path, OPENMETER_MAX_QUEUE_BYTES="10000")

    assert_adds_up(total, clients)
    assert total.dropped["queue_full"] > 0
    taken = {event["id"] for event in openmeter.taken}
    assert total.delivered <= len(taken) <= total.delivered + total.waiting


@pytest.mark.load
def test_all_that_was_settled_is_accounted_for_in_a_spool(openmeter, tmp_path):
    spool = str(tmp_path / "spool")

    total, clients = account(openmeter, tmp_path, OPENMETER_SPOOL_DIR=spool)

    # Each process counted the spool at its own end; only its present state counts.
    look = OpenMeterMiddleware(
        lambda *_: [], api_url=openmeter.url, spool_dir=spool, meters={"requests": 1}
    ).stats()
    total = replace(total, waiting=total.waiting - total.waiting_in_spool)
    total = replace(total, waiting_in_spool=0) + look
    assert_adds_up(total, clients)
    assert total.lost == 0
    taken = {event["id"] for event in openmeter.taken}
    assert total.delivered <= len(taken) <= total.delivered + total.waiting
