"""From a policy to what its process knows of entitlements."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from openmeter_wsgi.entitlements.asking import Asker
from openmeter_wsgi.entitlements.checking import Entitlements
from openmeter_wsgi.entitlements.client_v3 import ClientV3
from openmeter_wsgi.entitlements.countdown import Countdown
from openmeter_wsgi.entitlements.known import Lifetimes
from openmeter_wsgi.ledger import Ledger, open_store
from openmeter_wsgi.questions import ClientV1

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.questions import QuestionClient

#: First sights leave this part of the questions to customers that are known.
_RESERVED_QUESTIONS = 0.5


#: Seconds for which the id of a customer holds by which version 3 is asked. Of a
#: customer that is deleted meanwhile OpenMeter says so.
_IDS_HOLD = 600.0


def question_client(policy: Policy, timeout: float) -> QuestionClient:
    """Return a client for the version and the server that *policy* names."""
    url = policy.entitlements_url or policy.api_url
    key = policy.questions_key
    if policy.api_flavor == "v3":
        return ClientV3(url=url, key=key, timeout=timeout)
    path = policy.entitlements_path
    return ClientV1(url=url, path=path, key=key, timeout=timeout)


def _id_lifetimes(policy: Policy, lifetimes: Lifetimes) -> Lifetimes:
    """Return how long the customer of a subject is known."""
    if policy.api_flavor == "v3":
        return lifetimes._replace(allow=max(lifetimes.allow, _IDS_HOLD))
    return lifetimes


def entitlements_of(
    policy: Policy, delivered_until: Callable[[], float]
) -> Entitlements:
    """Return the entitlements of one process. Opens nothing and starts no thread."""
    rate = policy.question_rate
    store = open_store(spool_dir=policy.spool_dir, redis_url=policy.redis_url)
    ledger = Ledger(
        store, visibility_lag=policy.visibility_lag, delivered_until=delivered_until
    )
    new_client = partial(question_client, policy, policy.entitlement_timeout)
    lifetimes = Lifetimes(policy.allow_ttl, policy.deny_ttl, policy.max_stale)
    return Entitlements(
        new_asker=lambda answering: Asker(
            new_client=new_client,
            answering=answering,
            take_question=lambda reserve: store.take_question(rate, reserve=reserve),
            timeout=policy.entitlement_timeout,
            reserve=max(min(rate * _RESERVED_QUESTIONS, rate - 1), 0),
        ),
        countdown=Countdown(ledger, policy.entitlement_meters),
        lifetimes=lifetimes,
        id_lifetimes=_id_lifetimes(policy, lifetimes),
        cache_size=policy.entitlement_cache_size,
        close_store=store.close,
        tells_periods=any(
            each.usage_headers
            for each in (policy, *(own for _, own in policy.of_routes))
            if each is not None
        ),
    )
