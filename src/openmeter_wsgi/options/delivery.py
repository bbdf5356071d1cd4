"""Options of a policy: how its events reach OpenMeter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable  # noqa: TC003 - a hint
from typing import Annotated, Literal, TypeAlias

import msgspec

from openmeter_wsgi.options import values as read

ApiFlavor: TypeAlias = Literal["v1", "v3"]


@dataclasses.dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class DeliveryOptions:
    """How events reach OpenMeter: one for the whole process."""

    #: The key of OpenMeter Cloud or Kong Konnect: text, or a callable that is called
    #: again after a 401. A server of your own needs none.
    api_key: str | Callable[[], str] | None = dataclasses.field(
        default=None, repr=False, metadata={"read": read.key}
    )
    #: A file that holds the key, read again after a 401.
    api_key_file: str | None = None
    #: The key for questions about entitlements; default: ``api_key``.
    entitlements_api_key: str | Callable[[], str] | None = dataclasses.field(
        default=None, repr=False, metadata={"read": read.key}
    )
    #: The server's address, without ``/api`` and what follows.
    api_url: str = dataclasses.field(
        default="https://openmeter.cloud", metadata={"read": read.url}
    )
    #: The version of OpenMeter's API that takes events and answers questions:
    #: ``"v1"`` (with v2 for entitlements), or ``"v3"``, the only one of Kong Konnect.
    api_flavor: ApiFlavor = dataclasses.field(
        default="v1", metadata={"read": read.api_flavor}
    )
    #: Seconds until an attempt without an answer is given up.
    request_timeout: Annotated[float, msgspec.Meta(gt=0, le=600)] = 10.0

    #: Events that make a batch go before ``flush_interval`` is over.
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 100
    #: Seconds that an event waits for others at most.
    flush_interval: Annotated[float, msgspec.Meta(gt=0, le=3_600)] = 1.0
    #: Of so many events the queue in memory takes no more; what is dropped is counted.
    max_queue_events: Annotated[int, msgspec.Meta(ge=1)] = 250_000
    #: The same as bytes. Whichever is reached first holds.
    max_queue_bytes: Annotated[int, msgspec.Meta(ge=1_000_000)] = 100_000_000
    #: Seconds that the exit of a process may take for what still waits.
    shutdown_timeout: Annotated[float, msgspec.Meta(ge=0, le=3_600)] = 5.0
    #: Where settled usage waits, so that it survives the process; None: in memory.
    #: One directory per OpenMeter server and key; any number of processes.
    spool_dir: str | None = None
    #: How a process appends there. ``"auto"``: the fastest form that is safe there.
    journal: Literal["auto", "mmap", "write"] = "auto"
    #: Of this size the spool takes no more; a segment per process more or less.
    max_spool_bytes: Annotated[int, msgspec.Meta(ge=16 * 1024**2)] = 1024**3
    #: Seconds for which a batch without an answer may be sent again. Longer than
    #: OpenMeter remembers ids, it might be billed twice.
    resend_window: Annotated[float, msgspec.Meta(gt=0)] = 86_400.0
    #: ``"ship"``: another process delivers the spool, this one starts no thread.
    delivery: Literal["thread", "ship"] = "thread"
    #: Settle, count and log what would be billed, and send nothing.
    dry_run: bool = False
