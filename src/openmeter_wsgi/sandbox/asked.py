"""Routes that answer questions about entitlements: counted, and led into faults."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from openmeter_wsgi.sandbox.parts import parts
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.questions import Question

if TYPE_CHECKING:
    from collections.abc import Callable

_P = ParamSpec("_P")
_R = TypeVar("_R")


def question(kind: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make a route one that is counted, and that meets the faults of questions."""

    def decorate(view: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(view)
        def answer(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            here = parts()
            who = kwargs.get("customer", kwargs.get("subject"))
            feature = kwargs.get("feature")
            here.questions.add(
                Question(kind, str(who), None if feature is None else str(feature))
            )
            try:
                here.faults.entitlements.check()
                if here.faults.entitlements.draw() is not None:
                    raise Problem(500)
                return view(*args, **kwargs)
            finally:
                here.faults.entitlements.delay()

        return answer

    return decorate
