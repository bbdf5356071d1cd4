"""Options of a policy: whose requests are let in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping  # noqa: TC003 - hints
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from openmeter_wsgi.options import entitlement_values as read_entitlement
from openmeter_wsgi.options import values as read
from openmeter_wsgi.options.entitlement_values import CountedMeter  # noqa: TC001 - a hint

FailMode: TypeAlias = Literal["open", "closed", "stale"]
EntitlementsPath: TypeAlias = Literal["v2", "v1", "subjects"]


@dataclasses.dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class EntitlementOptions:
    """Whose requests are let in, and what happens to the others."""

    #: The features that a request's customer must have access to, all of them.
    required_entitlements: tuple[str, ...] = dataclasses.field(
        default=(), metadata={"read": read_entitlement.features}
    )
    #: From a subject to the key of its customer: a callable or a mapping. Default:
    #: the subject itself.
    customer: Callable[[str], str | None] | Mapping[str, str] | None = (
        dataclasses.field(default=None, metadata={"read": read_entitlement.customer})
    )
    #: What decides where OpenMeter does not answer and nothing is known: let through,
    #: answer 503, or go by the last known answer however old it is.
    fail_mode: FailMode = "open"
    #: False: decide, count and log, and let everything through.
    enforce: bool = True
    #: The status of a denial for a quota that is used up.
    limit_status: Literal[429, 402, 403] = 429
    #: A callable on environ and decision; the WSGI application it returns answers.
    denied_response: Callable[[dict[str, Any], Any], Any] | None = dataclasses.field(
        default=None, metadata={"read": read.function}
    )
    #: Whether responses tell limit, remaining and reset in RateLimit headers.
    usage_headers: bool = False
    #: Features whose quota is counted down between two answers, and the meter types
    #: that they count (a list where both have the same name).
    entitlement_meters: Mapping[str, CountedMeter] = dataclasses.field(
        default_factory=dict, metadata={"read": read_entitlement.counted_meters}
    )
    #: What a request sets apart when it begins, by feature, where the policy's own
    #: meters do not say it; or a callable on the environ that says so.
    reserve: Mapping[str, float] | Callable[[dict[str, Any]], Any] | None = (
        dataclasses.field(default=None, metadata={"read": read_entitlement.reserved})
    )
    #: Where entitlements are asked for; default: ``api_url``.
    entitlements_url: str | None = dataclasses.field(
        default=None, metadata={"read": read.optional_url}
    )
    #: With ``api_flavor="v1"``: customers of v2 or v1, or the subjects of v1, which
    #: OpenMeter has deprecated and announced to remove.
    entitlements_path: EntitlementsPath = "v2"
    #: Seconds that a request waits for an answer never heard before.
    entitlement_timeout: Annotated[float, msgspec.Meta(gt=0, le=60)] = 1.0
    #: Seconds for which an allowance holds; then it is asked for anew, behind the
    #: back of a request.
    allow_ttl: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    #: Seconds for which a denial holds.
    deny_ttl: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    #: Seconds for which either answer holds longer while OpenMeter does not answer.
    max_stale: Annotated[float, msgspec.Meta(ge=0)] = 600.0
    #: Answers that a process keeps, one per customer and feature.
    entitlement_cache_size: Annotated[int, msgspec.Meta(ge=1)] = 10_000
    #: Questions a second that all who share a spool or a Redis ask at most, and each
    #: process where there is neither. OpenMeter Cloud allows 30.
    question_rate: Annotated[float, msgspec.Meta(gt=0)] = 25.0
    #: Seconds after which OpenMeter has counted what was delivered to it.
    visibility_lag: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    #: A Redis that hosts share, so that a quota holds across all of them.
    redis_url: str | None = dataclasses.field(
        default=None, repr=False, metadata={"read": read.redis_url}
    )
