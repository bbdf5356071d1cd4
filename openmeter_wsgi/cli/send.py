"""``openmeter-wsgi send``: send one event, or the events of a file."""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import tempfile
import time
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import click
import msgspec

from openmeter_wsgi.cli import kafka_retention
from openmeter_wsgi.cli.api_client import error_text
from openmeter_wsgi.cli.common import (
    ANSWER_IS_NO,
    BadConfiguration,
    exit_codes,
    options_given,
    print_json,
    printable,
    progress,
    read_policy,
    server_options,
)
from openmeter_wsgi.cli.kafka_retention import is_old
from openmeter_wsgi.delivery.client import OpenMeterClient
from openmeter_wsgi.errors import (
    ConfigError,
    DeliveryError,
    MeterValueError,
    Rejected,
    Unavailable,
)
from openmeter_wsgi.events import (
    MAX_BATCH_BYTES,
    VALUE_PROPERTY,
    derived_id,
    encode_events,
    read_usage,
    size_problem,
)
from openmeter_wsgi.spool.dead_letters import DEAD_LETTERS
from openmeter_wsgi.spool.server_directories import server_directory, server_of_policy
from openmeter_wsgi.usage import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from openmeter_wsgi.delivery.sender import Client
    from openmeter_wsgi.policy import Policy


_SENT = ("type", "data", "id", "subject", "source", "time")
#: Part of CloudEvents, and nothing that OpenMeter looks at.
_TAKEN = {*_SENT, "specversion", "datacontenttype", "dataschema"}


class InvalidEvent(Exception):
    """A document that OpenMeter would refuse, or take and not count."""


def read_line(line: bytes) -> Any:
    """Return the document of a line. Of a line of ``spool export`` it is the event.

    :raises InvalidEvent: if it is none.
    """
    try:
        document = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidEvent(f"expected JSON: {error}") from None
    if isinstance(document, dict) and isinstance(document.get("event"), dict):
        return document["event"]
    return document


def encode_event(document: Any, *, source: str, new_id: str | None = None) -> bytes:
    """Encode one event.

    :param source: of an event that names none.
    :param new_id: the id of an event that has none, which must have one otherwise.
    :raises InvalidEvent: naming what is wrong with it.
    """
    if not isinstance(document, dict):
        raise InvalidEvent(f"expected an event, a JSON object, got {document!r:.100}")
    _check_attributes(document)
    event = {name: document[name] for name in _SENT if document.get(name) is not None}
    if "id" not in event:
        if new_id is None:
            raise InvalidEvent(
                "id: expected one, by which a repetition is dropped, got none (or give "
                "--new-ids)"
            )
        event["id"] = new_id
    for name in ("type", "subject"):
        if not isinstance(event.get(name), str) or not event[name]:
            raise InvalidEvent(f"{name}: expected text, got {document.get(name)!r}")
    try:
        meters = read_usage(event).documents
        (encoded,) = encode_events(meters, request_id="", subject=None, source=source)
    except (MeterValueError, ValueError) as error:
        raise InvalidEvent(str(error)) from None
    if problem := size_problem(encoded):
        raise InvalidEvent(problem)
    return encoded


def _check_attributes(document: Mapping[str, Any]) -> None:
    if document.get("specversion", "1.0") != "1.0":
        raise InvalidEvent(
            f"specversion: expected '1.0', got {document['specversion']!r}"
        )
    content = document.get("datacontenttype") or "application/json"
    if content != "application/json":
        raise InvalidEvent(
            f"datacontenttype: expected 'application/json', got {content!r}"
        )
    if unknown := [name for name in document if name not in _TAKEN]:
        raise InvalidEvent(
            f"{unknown[0]}: OpenMeter keeps no such attribute; put it into data"
        )


class InvalidLine(NamedTuple):
    """A line that holds no valid event, and the problem."""

    line: int
    problem: str


class CheckedEvents:
    """The valid events of many lines, kept in a file until all are checked."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.count: int = 0
        #: How many of the valid ones are older than what Kafka keeps.
        self.old: int = 0
        self.flaws: list[InvalidLine] = []

    def add(self, lines: Iterable[bytes], *, source: str, new_ids: bool) -> None:
        """Check *lines*; empty ones are passed over."""
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            new_id = secrets.token_hex(16) if new_ids else None
            try:
                event = encode_event(read_line(line), source=source, new_id=new_id)
            except InvalidEvent as error:
                self.flaws.append(InvalidLine(number, str(error)))
            else:
                self._file.write(event + b"\n")
                self.count += 1
                self.old += is_old(event)

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        for line in self._file:
            yield line[:-1]


#: The first repetition comes within so many seconds, later ones so far apart at most.
_FIRST_DELAY, _MAX_DELAY = 1.0, 30.0


class RejectedEvent(NamedTuple):
    """An event that OpenMeter does not take."""

    id: str
    reason: str


class GaveUp(Exception):
    """OpenMeter takes no events, now or as it is configured."""


class Sending:
    """Sends events and counts what became of them.

    Unlike the sender of a queue it gives up: after *patience* seconds in which nothing
    got through, or at once where the configuration makes every attempt vain.
    """

    def __init__(
        self,
        client: Client[list[bytes]],
        *,
        batch_size: int,
        patience: float,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.sent: int = 0
        self.refused: list[RejectedEvent] = []
        self._client = client
        self._batch_size = batch_size
        self._patience = patience
        self._sleep = sleep
        self._jitter = jitter

    def send(self, events: Iterable[bytes]) -> None:
        """Send *events* in order.

        :raises GaveUp: if OpenMeter takes no more of them.
        """
        for batch in self._batches(events):
            self._send(batch)

    def _batches(self, events: Iterable[bytes]) -> Iterator[list[bytes]]:
        batch: list[bytes] = []
        size = 0
        for event in events:
            full = len(batch) >= self._batch_size or size + len(event) > MAX_BATCH_BYTES
            if batch and full:
                yield batch
                batch, size = [], 0
            batch.append(event)
            size += len(event)
        if batch:
            yield batch

    def _send(self, batch: list[bytes]) -> None:
        try:
            self._attempts(batch)
        except Rejected as error:
            if len(batch) == 1:
                id_ = msgspec.json.decode(batch[0])["id"]
                self.refused.append(
                    RejectedEvent(id_, f"{error.status}: {error.reason}")
                )
                return
            middle = len(batch) // 2
            self._send(batch[:middle])
            self._send(batch[middle:])
        else:
            self.sent += len(batch)

    def _attempts(self, batch: list[bytes]) -> None:
        deadline = time.monotonic() + self._patience
        failures = 0
        while True:
            try:
                self._client.ingest(batch)
            except Unavailable as error:
                delay = self._delay(failures, error.retry_after)
                if time.monotonic() + delay > deadline:
                    raise GaveUp(_told(error)) from error
                failures += 1
                self._sleep(delay)
            except Rejected:
                raise
            except DeliveryError as error:
                raise GaveUp(_told(error)) from error
            else:
                return

    def _delay(self, failures: int, asked: float | None) -> float:
        longest = min(_MAX_DELAY, _FIRST_DELAY * 2 ** min(failures, 10))
        return max(self._jitter(0, longest), asked or 0.0)


def _told(error: DeliveryError) -> str:
    if error.status is None:
        return f"OpenMeter does not answer: {error_text(error)}"
    return f"OpenMeter answers {error.status}: {error.reason}"


_EXIT_CODES = exit_codes(
    _0="every event is taken", _3="events are invalid or refused; each is named"
)
#: Of what is wrong with many events people are shown as much.
_MAX_SHOWN = 20


@click.command("send", epilog=_EXIT_CODES)
@click.argument("file", type=click.File("rb"), required=False, metavar="[FILE]")
@click.option("--type", "type", metavar="TYPE", help="Type of a single event.")
@click.option("--subject", help="Its subject: who is billed.")
@click.option("--data", metavar="JSON", help="Its data.  [default: a total of 1]")
@click.option("--id", "id", metavar="ID", help="Its id.  [default: a new one]")
@click.option(
    "--key",
    metavar="KEY",
    help="A key in place of an id: the same subject and key are the same event.",
)
@click.option("--source", metavar="URI", help="Its source.  [default: event_source]")
@click.option("--time", metavar="RFC3339", help="When it was.  [default: now]")
@click.option("--new-ids", is_flag=True, help="Give an id to events of FILE without.")
@click.option("--skip-invalid", is_flag=True, help="Send the other events of FILE.")
@click.option("--dry-run", is_flag=True, help="Check the events, and send none.")
@click.option(
    "--retry-for",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to try again while OpenMeter does not answer.",
)
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    context: click.Context,
    /,
    file: IO[bytes] | None,
    policy_file: str | None,
    api_url: str | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Send one event (--type, --subject), or those in FILE; "-" is stdin.

    With a spool_dir the events go through the spool: they are sent later if OpenMeter
    does not answer within --retry-for.

    FILE holds a JSON document a line: CloudEvents, or what "spool export" writes.
    All of it is checked before anything is sent. Each event needs an id of its own,
    by which OpenMeter drops it when the file is sent again.
    """
    event = _event_given(how)
    if (file is None) is (event is None):
        raise click.UsageError("Give FILE, or else --type and --subject.")
    policy = read_policy(policy_file, **options_given(api_url=api_url))
    with tempfile.TemporaryFile() as kept:
        events = CheckedEvents(kept)
        if file is not None:
            lines = progress(file, "Checking", None)
            events.add(lines, source=policy.event_source, new_ids=how["new_ids"])
        elif event is not None:
            encoded = _encoded(event, policy)
            kept.write(encoded + b"\n")
            events.count, events.old = 1, int(kafka_retention.is_old(encoded))
        if events.old:
            about = kafka_retention.several(events.old)
            click.echo(f"Warning: {about}: {kafka_retention.REMEDY}", err=True)
        outcome = Outcome(events, policy)
        if not how["dry_run"] and (how["skip_invalid"] or not events.flaws):
            outcome.send(how["retry_for"])
    outcome.tell(as_json=as_json, dry_run=how["dry_run"])
    context.exit(outcome.exit_code)


def _event_given(how: dict[str, Any]) -> dict[str, Any] | None:
    """Return the event that the options say, None if they say none."""
    names = ("type", "subject", "data", "id", "key", "source", "time")
    return options_given(**{name: how[name] for name in names}) or None


def _encoded(event: dict[str, Any], policy: Policy) -> bytes:
    try:
        if "data" in event:
            event["data"] = msgspec.json.decode(event["data"])
        else:
            event["data"] = {VALUE_PROPERTY: 1}
        key = event.pop("key", None)
        if key is not None and "id" in event:
            raise click.UsageError("Give --id or --key, not both.")
        if key == "":
            raise click.UsageError("--key: expected text that is not empty.")
        made = secrets.token_hex(16)
        if key is not None:
            made = f"{derived_id(event.get('subject', ''), key)}:{event.get('type')}"
        return encode_event(event, source=policy.event_source, new_id=made)
    except msgspec.DecodeError as error:
        raise click.UsageError(f"--data: expected JSON: {error}") from None
    except InvalidEvent as error:
        raise click.UsageError(printable(str(error))) from None


class Outcome:
    """Sends the events, and tells the result."""

    def __init__(self, events: CheckedEvents, policy: Policy) -> None:
        self._events = events
        self._policy = policy
        self._sent = 0
        self._refused: Sequence[RejectedEvent] = ()
        self._error: str | None = None
        #: The reason why events wait in the spool, None if they do not.
        self._waits: str | None = None
        # So that a single event can be found, or sent again, by its id.
        self._ids = [_id(event) for event in events] if events.count == 1 else []

    @property
    def exit_code(self) -> int:
        """Return the exit code of the command."""
        if self._error is not None:
            return 1
        return ANSWER_IS_NO if self._events.flaws or self._refused else 0

    def send(self, patience: float) -> None:
        """Send the valid ones, through the spool if the policy has one."""
        if self._policy.spool_dir is None or self._policy.dry_run:
            self._send_directly(patience)
            return
        try:
            usage = Usage(self._policy)
        except ConfigError as error:
            raise BadConfiguration(printable("; ".join(error.problems))) from None
        server = server_of_policy(self._policy)
        directory = server_directory(self._policy.spool_dir, server)
        self._send_through_spool(usage, directory, patience)

    def _send_through_spool(
        self, usage: Usage, directory: Path, patience: float
    ) -> None:
        # The command says itself what became of the events.
        logging.getLogger("openmeter_wsgi").addHandler(logging.NullHandler())
        letters = directory / DEAD_LETTERS
        seen = letters.stat().st_size if letters.exists() else 0
        usage.put(progress(self._events, "Writing", self._events.count))
        try:
            if not usage.flush(patience):
                problems = [problem.text for problem in usage.health().problems]
                self._waits = "; ".join(problems) or "no process has sent them yet"
        except KeyboardInterrupt:
            self._waits = "interrupted"
        if lost := usage.stats().lost:
            self._error = f"{lost} events found no room in the spool, and are lost"
        usage.close(0)
        if self._waits is None:
            self._refused = _refused(self._events, letters, seen)
            self._sent = self._events.count - len(self._refused)

    def _send_directly(self, patience: float) -> None:
        policy = self._policy
        client = OpenMeterClient(
            url=policy.api_url,
            flavor=policy.api_flavor,
            key=policy.key,
            timeout=policy.request_timeout,
        )
        sending = Sending(client, batch_size=policy.batch_size, patience=patience)
        try:
            sending.send(progress(self._events, "Sending", self._events.count))
        except GaveUp as error:
            self._error = str(error)
        except KeyboardInterrupt:
            self._error = "interrupted"
        finally:
            client.close()
        self._sent, self._refused = sending.sent, sending.refused

    def tell(self, *, as_json: bool, dry_run: bool) -> None:
        """Print the result."""
        count, flaws = self._events.count, self._events.flaws
        if as_json:
            print_json({
                "valid": count,
                "sent": self._sent,
                "invalid": [flaw._asdict() for flaw in flaws],
                "refused": [refusal._asdict() for refusal in self._refused],
                "waits": self._waits,
                "error": self._error,
            })  # fmt: skip
        else:
            _complain([f"line {flaw.line}: {flaw.problem}" for flaw in flaws])
            _complain([f"refused: {one.id}: {one.reason}" for one in self._refused])
            if dry_run:
                click.echo(f"{count} valid, {len(flaws)} invalid; nothing was sent")
            else:
                named = "".join(f": {printable(each)}" for each in self._ids)
                sent = f"sent {self._sent}" if self._waits is None else f"wrote {count}"
                click.echo(f"{sent} of {count + len(flaws)} events{named}")
        if self._waits is not None:
            click.echo(
                f"Warning: the events wait in {self._policy.spool_dir!r} and are sent "
                f"by the next process that delivers it: {printable(self._waits)}",
                err=True,
            )
        if self._error is not None:
            rest = count - self._sent - len(self._refused)
            click.echo(
                f"Error: {printable(self._error)}; not sent: {rest}. Send the same "
                "again: what has arrived is dropped by its id, where deduplication is "
                "on",
                err=True,
            )


def _refused(events: Iterable[bytes], letters: Path, seen: int) -> list[RejectedEvent]:
    """Return those of *events* that are in *letters* behind the first *seen* bytes."""
    reasons: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError), letters.open("rb") as file:
        file.seek(seen)
        for line in file:
            letter = msgspec.json.decode(line)
            reasons[letter["event"]["id"]] = f"{letter['status']}: {letter['reason']}"
    ids = map(_id, events) if reasons else ()
    return [RejectedEvent(id_, reasons[id_]) for id_ in ids if id_ in reasons]


def _id(event: bytes) -> str:
    return str(msgspec.json.decode(event)["id"])


def _complain(about: Sequence[str]) -> None:
    for line in about[:_MAX_SHOWN]:
        click.echo(printable(line), err=True)
    if (more := len(about) - _MAX_SHOWN) > 0:
        click.echo(f"… and {more} more", err=True)
