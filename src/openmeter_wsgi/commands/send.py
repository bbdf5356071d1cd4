"""``openmeter-wsgi send``: an event from the command line, or those of a file."""

from __future__ import annotations

import secrets
import tempfile
from typing import IO, TYPE_CHECKING, Any

import click
import msgspec

from openmeter_wsgi.commands import old_events
from openmeter_wsgi.commands.event_lines import (
    CheckedEvents,
    InvalidEvent,
    encode_event,
)
from openmeter_wsgi.commands.exit_codes import ANSWER_IS_NO, exit_codes
from openmeter_wsgi.commands.opening import options_given, read_policy, server_options
from openmeter_wsgi.commands.output import print_json, printable, progress
from openmeter_wsgi.commands.sending import GaveUp, Refusal, Sending
from openmeter_wsgi.delivery.client import OpenMeterClient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openmeter_wsgi.policy import Policy

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
            events.count, events.old = 1, int(old_events.is_old(encoded))
        if events.old:
            about = old_events.several(events.old)
            click.echo(f"Warning: {about}: {old_events.REMEDY}", err=True)
        outcome = Outcome(events, policy)
        if not how["dry_run"] and (how["skip_invalid"] or not events.flaws):
            outcome.send(how["retry_for"])
    outcome.tell(as_json=as_json, dry_run=how["dry_run"])
    context.exit(outcome.exit_code)


def _event_given(how: dict[str, Any]) -> dict[str, Any] | None:
    """Return the event that the options say, None if they say none."""
    names = ("type", "subject", "data", "id", "source", "time")
    return options_given(**{name: how[name] for name in names}) or None


def _encoded(event: dict[str, Any], policy: Policy) -> bytes:
    try:
        if "data" in event:
            event["data"] = msgspec.json.decode(event["data"])
        else:
            event["data"] = {policy.value_property: 1}
        return encode_event(
            event, source=policy.event_source, new_id=secrets.token_hex(16)
        )
    except msgspec.DecodeError as error:
        raise click.UsageError(f"--data: expected JSON: {error}") from None
    except InvalidEvent as error:
        raise click.UsageError(printable(str(error))) from None


class Outcome:
    """What became of the events, and how the command says it."""

    def __init__(self, events: CheckedEvents, policy: Policy) -> None:
        self._events = events
        self._policy = policy
        self._sent = 0
        self._refused: Sequence[Refusal] = ()
        self._error: str | None = None
        # So that a single event can be found, or sent again, by its id.
        self._ids = [_id(event) for event in events] if events.count == 1 else []

    @property
    def exit_code(self) -> int:
        """Return how the command ends."""
        if self._error is not None:
            return 1
        return ANSWER_IS_NO if self._events.flaws or self._refused else 0

    def send(self, patience: float) -> None:
        """Send the valid ones."""
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
        """Say what became of them."""
        count, flaws = self._events.count, self._events.flaws
        if as_json:
            print_json({
                "valid": count,
                "sent": self._sent,
                "invalid": [flaw._asdict() for flaw in flaws],
                "refused": [refusal._asdict() for refusal in self._refused],
                "error": self._error,
            })  # fmt: skip
        else:
            _complain([f"line {flaw.line}: {flaw.problem}" for flaw in flaws])
            _complain([f"refused: {one.id}: {one.reason}" for one in self._refused])
            if dry_run:
                click.echo(f"{count} valid, {len(flaws)} invalid; nothing was sent")
            else:
                named = "".join(f": {printable(each)}" for each in self._ids)
                click.echo(f"sent {self._sent} of {count + len(flaws)} events{named}")
        if self._error is not None:
            rest = count - self._sent - len(self._refused)
            click.echo(
                f"Error: {printable(self._error)}; not sent: {rest}. Send the same "
                "again: what has arrived is dropped by its id, where deduplication is "
                "on",
                err=True,
            )


def _id(event: bytes) -> str:
    return str(msgspec.json.decode(event)["id"])


def _complain(about: Sequence[str]) -> None:
    for line in about[:_MAX_SHOWN]:
        click.echo(printable(line), err=True)
    if (more := len(about) - _MAX_SHOWN) > 0:
        click.echo(f"… and {more} more", err=True)
