"""Health: the problems a process has now, and an endpoint that reports them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse

#: Seconds that the oldest event may wait before that is a problem.
MAX_AGE = 300.0


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong."""

    #: ``held``: a wrong key or address. ``unavailable``: OpenMeter does not answer.
    #: ``refused``: it refuses everything. ``backlog``: the oldest event waits for too
    #: long. ``not_delivering``: events wait and no thread delivers them.
    #: ``queue_full``: new events are dropped. ``spool_failing``: the disk takes none;
    #: they wait in memory. ``spool_dropping``: the same, and they are dropped.
    #: ``two_keys``: two running processes send to one server with different keys.
    #: ``entitlements``: no answers about who may.
    code: str
    #: One line: what is lost or delayed, and what happens next.
    text: str
    #: Whether usage is being lost by it.
    loses: bool = False


class Health(msgspec.Struct, frozen=True):
    """The problems of one process."""

    problems: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """True if there is no problem."""
        return not self.problems

    @property
    def loses(self) -> bool:
        """True if usage is being lost."""
        return any(problem.loses for problem in self.problems)


class HealthEndpoint:
    """A WSGI application that tells the health of the process that serves it.

    Status 200 or 503 and a document. It is 503 while usage is being lost; an outage
    of OpenMeter delays usage and takes no server out of service. With
    ``fail_on="problem"`` any problem is 503.
    """

    def __init__(
        self,
        health: Callable[[], Health],
        *,
        fail_on: Literal["loss", "problem"] = "loss",
    ) -> None:
        if fail_on not in {"loss", "problem"}:
            raise ValueError(f"fail_on: expected 'loss' or 'problem', got {fail_on!r}")
        self._health = health
        self._fail_on = fail_on

    def __call__(
        self,
        environ: dict[str, Any],
        start_response: StartResponse,
    ) -> Iterable[bytes]:
        """Answer one request (PEP 3333)."""
        health = self._health()
        fails = health.loses if self._fail_on == "loss" else not health.ok
        body = msgspec.json.encode({"ok": health.ok, "problems": health.problems})
        status = "503 Service Unavailable" if fails else "200 OK"
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
        ]
        start_response(status, headers)
        return [] if environ.get("REQUEST_METHOD", "").upper() == "HEAD" else [body]
