"""``openmeter-wsgi ship``: deliver a spool, as a separate process."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Final

import click

from openmeter_wsgi.cli import kafka_retention
from openmeter_wsgi.cli.common import (
    EXIT_CODES,
    BadConfiguration,
    open_spool,
    printable,
    read_policy,
    spool_options,
    stop_signals,
)
from openmeter_wsgi.cli.spool_access import DeadLetterFile
from openmeter_wsgi.delivery.client import OpenMeterClient
from openmeter_wsgi.entitlements.service import follow_delivery, visibility_of
from openmeter_wsgi.lock import ELECTION, holder
from openmeter_wsgi.spool.delivery import SpoolDelivery
from openmeter_wsgi.spool.server_directories import (
    server_directory,
    server_of_policy,
    spool_directories,
)
from openmeter_wsgi.stats import Counts

if TYPE_CHECKING:
    from pathlib import Path

    from openmeter_wsgi.cli.common import StopEvent
    from openmeter_wsgi.policy import Policy

logger: Final = logging.getLogger(__name__)


@click.command("ship", epilog=EXIT_CODES)
@spool_options
@click.option(
    "--json", "as_json", is_flag=True, help="Log in JSON, one line per message."
)
def command(spool_dir: str | None, policy_file: str | None, as_json: bool) -> None:
    """Deliver a spool to OpenMeter, in the foreground, until SIGTERM or SIGINT.

    Only one process at a time is the sender of a directory. While another process is
    the sender, this one waits, and takes over when that one ends. Run it as the owner
    of the directory. Give the applications delivery="ship" if none of their processes
    is to be the sender.
    """
    directory = open_spool(spool_dir, may_be_empty=True, to_write=True)
    policy = read_policy(policy_file, spool_dir=str(directory), delivery="thread")
    if policy.dry_run:
        raise BadConfiguration("dry_run is set, with which nothing is sent")
    _log_to_stderr(_JsonLines() if as_json else _Lines())
    for of_server in spool_directories(directory):
        _erase_settled(of_server)
    with stop_signals() as stopped:
        _ship(policy, directory, stopped)


def _ship(policy: Policy, directory: Path, stopped: StopEvent) -> None:
    new_client = partial(
        OpenMeterClient,
        url=policy.api_url,
        flavor=policy.api_flavor,
        key=policy.key,
        timeout=policy.request_timeout,
    )
    counts = Counts()

    def log_election() -> None:
        logger.info(
            "this process is the sender of %s to %s; %d events wait",
            directory, policy.api_url, queue.waiting,
        )  # fmt: skip
        if problem := kafka_retention.oldest(queue.in_spool.oldest_at):
            logger.warning("%s: %s: %s", directory, problem, kafka_retention.REMEDY)

    # The countdown of quotas in the applications depends on the deliveries of this
    # process.
    visibility = visibility_of(policy)
    queue = SpoolDelivery(
        policy, new_client, counts, elected=log_election, listener=visibility
    )
    if visibility is not None:
        follow_delivery(policy, visibility, queue, None)
    of_server = server_directory(directory, server_of_policy(policy))
    if (sender := holder(of_server / ELECTION)) is not None:
        logger.info(
            "%s has a sender, process %s; this process takes over when it ends",
            directory, sender if sender > 0 else "in another container",
        )  # fmt: skip
    queue.start()
    stopped.wait()
    logger.info("stopping within %.1f s", policy.shutdown_timeout)
    queue.close()
    if visibility is not None:
        visibility.close()
    # Otherwise the exit handler would wait for an answer once more.
    queue.forget_exit()
    logger.info(
        "stopped; %d events delivered, %d dead letters, %d events left in %s",
        counts.delivered, counts.dead_lettered, queue.waiting, directory,
    )  # fmt: skip


def _erase_settled(directory: Path) -> None:
    """Erase dead letters that were requeued or purged while a sender was running."""
    letters = DeadLetterFile(directory)
    with contextlib.suppress(OSError), letters.changing():
        letters.erase_settled()


class _Lines(logging.Formatter):
    """One line per message, control characters escaped; a traceback has more lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")

    @staticmethod
    def converter(timestamp: float | None) -> time.struct_time:
        """Return the time in UTC."""
        return time.gmtime(timestamp)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


class _JsonLines(_Lines):
    """One JSON document per message, with the traceback in it."""

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": self.formatTime(record, self.datefmt),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["stack"] = self.formatException(record.exc_info)
        return json.dumps(document)


def _log_to_stderr(formatter: logging.Formatter) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.getLogger().addHandler(handler)
    logging.getLogger("openmeter_wsgi").setLevel(logging.INFO)
