"""The short way through the gate, which most requests take: nothing has to be asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from openmeter_wsgi.request import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.entitlements.known import Known
    from openmeter_wsgi.request import RequestRecord
    from openmeter_wsgi.stats import Counts
    from openmeter_wsgi.subject import FindSubject

#: Says whether a request may pass, as far as that is known.
Passes: TypeAlias = "Callable[[dict[str, Any], RequestRecord], bool]"


def nothing_passes(_: dict[str, Any], __: RequestRecord) -> bool:
    """Let each request go the long way."""
    return False


def passing(
    known_of: Callable[[str], Known | None],
    clock: Callable[[], float],
    *,
    find_subject: FindSubject,
    anonymous: str | None,
    counts: Counts,
) -> Passes:
    """Return what lets a request pass whose customer is known to have access.

    For one feature that is not counted down. *anonymous* is who has to have access
    where a request does not say who is calling, None where *find_subject* has to be
    asked all the same. Whoever does not pass is not denied: that is for the gate to
    decide.
    """

    def passes(environ: dict[str, Any], request: RequestRecord) -> bool:
        # In one piece: each call costs a request.
        if environ.get("REQUEST_METHOD") in OPTIONS:
            return False
        if anonymous is None or request.caller or "REMOTE_USER" in environ:
            subject = find_subject(environ)
        else:
            subject = anonymous
        known = known_of(subject)  # type: ignore[arg-type] # nobody knows None
        if known is None or clock() >= known.fresh_until:
            return False
        decision = known.decision
        if not decision.allowed:
            return False
        known.used = True
        request.decision = decision
        counts.passed += 1
        return True

    return passes
