"""From a policy to what its process knows of entitlements."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from openmeter_wsgi.entitlements.asking import Asker
from openmeter_wsgi.entitlements.checking import Entitlements
from openmeter_wsgi.entitlements.countdown import Countdown
from openmeter_wsgi.entitlements.known import Lifetimes
from openmeter_wsgi.ledger import Ledger, open_store
from openmeter_wsgi.questions import QuestionClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.policy import Policy

#: First sights leave this part of the questions to customers that are known.
_RESERVED_QUESTIONS = 0.5


def entitlements_of(
    policy: Policy, delivered_until: Callable[[], float]
) -> Entitlements:
    """Return the entitlements of one process. Opens nothing and starts no thread."""
    rate = policy.question_rate
    store = open_store(spool_dir=policy.spool_dir, redis_url=policy.redis_url)
    ledger = Ledger(
        store, visibility_lag=policy.visibility_lag, delivered_until=delivered_until
    )
    new_client = partial(
        QuestionClient,
        url=policy.entitlements_url or policy.api_url,
        path=policy.entitlements_path,
        key=policy.questions_key,
        timeout=policy.entitlement_timeout,
    )
    return Entitlements(
        new_asker=lambda answering: Asker(
            new_client=new_client,
            answering=answering,
            take_question=lambda reserve: store.take_question(rate, reserve=reserve),
            timeout=policy.entitlement_timeout,
            reserve=max(min(rate * _RESERVED_QUESTIONS, rate - 1), 0),
        ),
        countdown=Countdown(ledger, policy.entitlement_meters),
        lifetimes=Lifetimes(policy.allow_ttl, policy.deny_ttl, policy.max_stale),
        cache_size=policy.entitlement_cache_size,
        close_store=store.close,
        tells_periods=any(
            each.usage_headers
            for each in (policy, *(own for _, own in policy.of_routes))
            if each is not None
        ),
    )
