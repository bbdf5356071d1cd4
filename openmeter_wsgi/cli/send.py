"""``openmeter-wsgi send``: send one event, or the events of a file.

All events are checked first and kept in a temporary file (`CheckedEvents`). `Outcome`
then sends them through the spool, or directly (`Sending`), and prints the result.
"""

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


#: Attributes of an event that are sent.
_SENT = ("type", "data", "id", "subject", "source", "time")
#: Attributes that are accepted. OpenMeter ignores those that are not sent.
_ACCEPTED = {*_SENT, "specversion", "datacontenttype", "dataschema"}


class InvalidEvent(Exception):
    """A document that OpenMeter would refuse, or take but not count."""


def read_line(line: bytes) -> Any:
    """Parse a line: a JSON document, or a line of ``spool export`` with an event in it.

    :raises InvalidEvent: if the line is not JSON.
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

    :param source: the source of an event without one.
    :param new_id: the id of an event without one; None if every event needs its own.
    :raises InvalidEvent: with the problem.
    """
    if not isinstance(document, dict):
        raise InvalidEvent(f"expected an event, a JSON object, got {document!r:.100}")
    _check_attributes(document)
    event = {name: document[name] for name in _SENT if document.get(name) is not None}
    if "id" not in event:
        if new_id is None:
            raise InvalidEvent(
                "id: expected text, by which OpenMeter drops repetitions, got none (or "
                "give --new-ids)"
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
    if unknown := [name for name in document if name not in _ACCEPTED]:
        raise InvalidEvent(
            f"{unknown[0]}: OpenMeter does not keep this attribute; put it into data"
        )


class InvalidLine(NamedTuple):
    """The number of a line without a valid event, and the problem."""

    line: int
    problem: str


class CheckedEvents:
    """The valid events of many lines, kept in a file until all are checked."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        #: Number of valid events.
        self.count: int = 0
        #: Number of valid events that Kafka may delete because of their age.
        self.old: int = 0
        self.invalid: list[InvalidLine] = []

    def add(self, lines: Iterable[bytes], *, source: str, new_ids: bool) -> None:
        """Check *lines*, and keep the valid events. Empty lines are skipped."""
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            new_id = secrets.token_hex(16) if new_ids else None
            try:
                event = encode_event(read_line(line), source=source, new_id=new_id)
            except InvalidEvent as error:
                self.invalid.append(InvalidLine(number, str(error)))
            else:
                self._file.write(event + b"\n")
                self.count += 1
                self.old += is_old(event)

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        for line in self._file:
            yield line[:-1]


#: Maximum number of seconds before the first repetition, and before any repetition.
_FIRST_DELAY, _MAX_DELAY = 1.0, 30.0


class RejectedEvent(NamedTuple):
    """The id of an event that OpenMeter refused, and its reason."""

    id: str
    reason: str


class GaveUp(Exception):
    """OpenMeter takes no events: it does not answer, or the configuration is wrong."""


class Sending:
    """Sends events directly to OpenMeter, without a queue.

    A refused batch is halved until the refused events are known. Sending stops if a
    batch is not taken within *patience* seconds, or at once if the configuration is
    wrong.
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
        self.rejected: list[RejectedEvent] = []
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
            self._ingest(batch)
        except Rejected as error:
            if len(batch) == 1:
                id_ = msgspec.json.decode(batch[0])["id"]
                self.rejected.append(
                    RejectedEvent(id_, f"{error.status}: {error.reason}")
                )
                return
            middle = len(batch) // 2
            self._send(batch[:middle])
            self._send(batch[middle:])
        else:
            self.sent += len(batch)

    def _ingest(self, batch: list[bytes]) -> None:
        deadline = time.monotonic() + self._patience
        failures = 0
        while True:
            try:
                self._client.ingest(batch)
            except Unavailable as error:
                delay = self._delay(failures, error.retry_after)
                if time.monotonic() + delay > deadline:
                    raise GaveUp(_text_of(error)) from error
                failures += 1
                self._sleep(delay)
            except Rejected:
                raise
            except DeliveryError as error:
                raise GaveUp(_text_of(error)) from error
            else:
                return

    def _delay(self, failures: int, retry_after: float | None) -> float:
        longest = min(_MAX_DELAY, _FIRST_DELAY * 2 ** min(failures, 10))
        return max(self._jitter(0, longest), retry_after or 0.0)


def _text_of(error: DeliveryError) -> str:
    if error.status is None:
        return f"OpenMeter does not answer: {error_text(error)}"
    return f"OpenMeter answers {error.status}: {error.reason}"


_EXIT_CODES = exit_codes(
    _0="every event is taken", _3="events are invalid or refused; each is named"
)
#: Maximum number of invalid or refused events that are printed as text.
_MAX_SHOWN = 20


@click.command("send", epilog=_EXIT_CODES)
@click.argument("file", type=click.File("rb"), required=False, metavar="[FILE]")
@click.option("--type", "type", metavar="TYPE", help="Type of a single event.")
@click.option("--subject", help="Its subject: the customer to bill.")
@click.option("--data", metavar="JSON", help="Its data.  [default: a total of 1]")
@click.option("--id", "id", metavar="ID", help="Its id.  [default: a new one]")
@click.option(
    "--key",
    metavar="KEY",
    help="Make the id from the subject and this key: repetitions are dropped.",
)
@click.option("--source", metavar="URI", help="Its source.  [default: event_source]")
@click.option("--time", metavar="RFC3339", help="Its time.  [default: now]")
@click.option(
    "--new-ids", is_flag=True, help="Give new ids to events of FILE without an id."
)
@click.option(
    "--skip-invalid",
    is_flag=True,
    help="Leave out the invalid events of FILE, and send the others.",
)
@click.option("--dry-run", is_flag=True, help="Check the events without sending them.")
@click.option(
    "--retry-for",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Time to repeat attempts while OpenMeter does not answer.",
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
    **options: Any,
) -> None:
    """Send one event (--type, --subject), or the events in FILE; "-" is stdin.

    With spool_dir the events go through the spool. If OpenMeter does not answer within
    --retry-for, they are sent later.

    FILE has one JSON document per line: CloudEvents, or the output of "spool export".
    The whole file is checked before anything is sent. Each event needs an id of its
    own, by which OpenMeter drops repetitions when the file is sent again.
    """
    event = _event_given(options)
    if (file is None) is (event is None):
        raise click.UsageError("Give FILE, or else --type and --subject.")
    policy = read_policy(policy_file, **options_given(api_url=api_url))
    with tempfile.TemporaryFile() as temporary:
        events = CheckedEvents(temporary)
        if file is not None:
            lines = progress(file, "Checking", None)
            events.add(lines, source=policy.event_source, new_ids=options["new_ids"])
        elif event is not None:
            encoded = _encoded(event, policy)
            temporary.write(encoded + b"\n")
            events.count, events.old = 1, int(kafka_retention.is_old(encoded))
        if events.old:
            problem = kafka_retention.several(events.old)
            click.echo(f"Warning: {problem}: {kafka_retention.REMEDY}", err=True)
        outcome = Outcome(events, policy)
        if not options["dry_run"] and (options["skip_invalid"] or not events.invalid):
            outcome.send(options["retry_for"])
    outcome.show(as_json=as_json, dry_run=options["dry_run"])
    context.exit(outcome.exit_code)


def _event_given(options: dict[str, Any]) -> dict[str, Any] | None:
    """Return the attributes of the event in *options*, None if there are none."""
    names = ("type", "subject", "data", "id", "key", "source", "time")
    return options_given(**{name: options[name] for name in names}) or None


def _encoded(event: dict[str, Any], policy: Policy) -> bytes:
    """Encode the event that the options of the command describe."""
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
        new_id = secrets.token_hex(16)
        if key is not None:
            new_id = f"{derived_id(event.get('subject', ''), key)}:{event.get('type')}"
        return encode_event(event, source=policy.event_source, new_id=new_id)
    except msgspec.DecodeError as error:
        raise click.UsageError(f"--data: expected JSON: {error}") from None
    except InvalidEvent as error:
        raise click.UsageError(printable(str(error))) from None


class Outcome:
    """Sends the events, and prints the result."""

    def __init__(self, events: CheckedEvents, policy: Policy) -> None:
        self._events = events
        self._policy = policy
        self._sent = 0
        self._rejected: Sequence[RejectedEvent] = ()
        self._error: str | None = None
        #: The reason why events wait in the spool, None if no event waits.
        self._wait_reason: str | None = None
        # Printed for a single event, so that it can be found or sent again.
        self._ids = [_id(event) for event in events] if events.count == 1 else []

    @property
    def exit_code(self) -> int:
        """Return the exit code of the command."""
        if self._error is not None:
            return 1
        return ANSWER_IS_NO if self._events.invalid or self._rejected else 0

    def send(self, patience: float) -> None:
        """Send the valid events, through the spool if the policy has one."""
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
        # No log lines: the command prints the result.
        logging.getLogger("openmeter_wsgi").addHandler(logging.NullHandler())
        dead_letters = directory / DEAD_LETTERS
        old_size = dead_letters.stat().st_size if dead_letters.exists() else 0
        usage.put(progress(self._events, "Writing", self._events.count))
        try:
            if not usage.flush(patience):
                problems = [problem.text for problem in usage.health().problems]
                self._wait_reason = (
                    "; ".join(problems) or "no process has sent them yet"
                )
        except KeyboardInterrupt:
            self._wait_reason = "interrupted"
        if lost := usage.stats().lost:
            self._error = f"the spool is full: {lost} events are lost"
        usage.close(0)
        if self._wait_reason is None:
            self._rejected = _rejected(self._events, dead_letters, old_size)
            self._sent = self._events.count - len(self._rejected)

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
        self._sent, self._rejected = sending.sent, sending.rejected

    def show(self, *, as_json: bool, dry_run: bool) -> None:
        """Print the result."""
        count, invalid = self._events.count, self._events.invalid
        reason = self._wait_reason
        if as_json:
            print_json({
                "valid": count,
                "sent": self._sent,
                "invalid": [line._asdict() for line in invalid],
                "refused": [event._asdict() for event in self._rejected],
                "waits": reason,
                "error": self._error,
            })  # fmt: skip
        else:
            _print_problems([f"line {line.line}: {line.problem}" for line in invalid])
            _print_problems(
                [f"refused: {event.id}: {event.reason}" for event in self._rejected]
            )
            if dry_run:
                click.echo(f"{count} valid, {len(invalid)} invalid; nothing was sent")
            else:
                ids = "".join(f": {printable(event_id)}" for event_id in self._ids)
                done = f"sent {self._sent}" if reason is None else f"wrote {count}"
                click.echo(f"{done} of {count + len(invalid)} events{ids}")
        if reason is not None:
            click.echo(
                f"Warning: the events wait in {self._policy.spool_dir!r}; the next "
                f"process that delivers this spool sends them: {printable(reason)}",
                err=True,
            )
        if self._error is not None:
            not_sent = count - self._sent - len(self._rejected)
            click.echo(
                f"Error: {printable(self._error)}; not sent: {not_sent}. Send the same "
                "events again: with deduplication, OpenMeter drops those that have "
                "arrived",
                err=True,
            )


def _rejected(
    events: Iterable[bytes], dead_letters: Path, old_size: int
) -> list[RejectedEvent]:
    """Return those of *events* that were appended to *dead_letters*."""
    reasons: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError), dead_letters.open("rb") as file:
        file.seek(old_size)
        for line in file:
            letter = msgspec.json.decode(line)
            reasons[letter["event"]["id"]] = f"{letter['status']}: {letter['reason']}"
    ids = map(_id, events) if reasons else ()
    return [RejectedEvent(id_, reasons[id_]) for id_ in ids if id_ in reasons]


def _id(event: bytes) -> str:
    return str(msgspec.json.decode(event)["id"])


def _print_problems(problems: Sequence[str]) -> None:
    for problem in problems[:_MAX_SHOWN]:
        click.echo(printable(problem), err=True)
    if (more := len(problems) - _MAX_SHOWN) > 0:
        click.echo(f"… and {more} more", err=True)
