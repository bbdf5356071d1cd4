"""Which members of a document are asked for, and what passes over all others."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# What is passed over at once, down to some depth, for a step in Python costs as much
# as a hundred bytes here. Possessive, so that going back takes no memory.
_TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_FLAT = rb'[^"{}\[\]]*+(?:%b[^"{}\[\]]*+)*+' % _TEXT
_DEEP = rb"%b(?:[{\[]%b[}\]]%b)*+" % (_FLAT, _FLAT, _FLAT)
_DEEPER = rb"%b(?:[{\[]%b[}\]]%b)*+" % (_FLAT, _DEEP, _FLAT)
#: The inside of a list or object, as far as it is not nested too deep.
NESTED = re.compile(_DEEPER, re.DOTALL)
_VALUE = rb"(?:%b|[{\[]%b[}\]]|[^][{}\",\s]++(?=[],}\s]))" % (_TEXT, _DEEPER)
_MEMBER = rb'[^"}]*+"(?!(?:%b)")[^"\\]*+"\s*+:\s*+%b'


class Wanted:
    """The members that are asked for.

    None keeps a value, another `Wanted` looks into an object, :data:`EACH` makes
    documents of the elements of a list, with what is wanted of the object around it.
    """

    def __init__(self, members: Mapping[bytes, Wanted | None]) -> None:
        self.members = members
        names = b"|".join(map(re.escape, members))
        #: Passes over what is not wanted, member by member.
        self.others = re.compile(rb"(?:%b)*+" % (_MEMBER % (names, _VALUE)), re.DOTALL)


#: See :class:`Wanted`.
EACH = Wanted({})
