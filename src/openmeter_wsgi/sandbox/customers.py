"""The customers: who pays, and under which subjects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openmeter_wsgi.sandbox.listing import subjects_of
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.resources import Resources

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.resources import Document
    from openmeter_wsgi.sandbox.schema import Schema
    from openmeter_wsgi.sandbox.store import Store

_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_SUBJECT_KEYS: Schema = {
    "type": "array",
    "items": {"type": "string", "minLength": 1},
}
CUSTOMER: Schema = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 256},
        "description": {"type": "string", "maxLength": 1024},
        "metadata": _TEXTS | {"nullable": True},
        "key": {"type": "string", "minLength": 1, "maxLength": 256},
        "usageAttribution": {
            "type": "object",
            "required": ["subjectKeys"],
            "properties": {"subjectKeys": _SUBJECT_KEYS},
        },
        "primaryEmail": {"type": "string"},
        "currency": {"type": "string", "pattern": "^[A-Z]{3}$"},
        "billingAddress": {"type": "object"},
    },
}


class Customers(Resources):
    """All customers; those that were deleted are remembered by their id."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, "customer", key="key")
        self._deleted = Resources(store, "deleted customer", key="key")

    def look_up(self, id_or_key: str) -> Document:
        """Return the one with this id, deleted or not, or this key; or answer 404."""
        found = self.find(id_or_key) or self._deleted.find(id_or_key)
        if found is None:
            detail = f"customer with id or key {id_or_key} not found"
            raise Problem(404, f"{detail} in default namespace")
        return found

    def get(self, id_or_key: str) -> Document:
        """Return what `look_up` does, or answer 412 if it is deleted."""
        found = self.look_up(id_or_key)
        if "deletedAt" in found:
            raise _gone(found)
        return found

    def of_subject(self, subject: str) -> Document:
        """Return the one that pays for *subject*, or answer 412 if deleted, or 404."""
        found = _payers(self, subject)
        if not found:
            if deleted := _payers(self._deleted, subject):
                raise _gone(deleted[-1])
            raise Problem(404, f"customer with subject key {subject} not found")
        # A key wins against the subjects that another customer names.
        return min(found, key=lambda one: one.get("key") != subject)


def _payers(customers: Resources, subject: str) -> list[Document]:
    return [one for one in customers.all() if subject in subjects_of(one)]


def _gone(customer: Document) -> Problem:
    where = f"namespace=default customer.id={customer['id']}"
    return Problem(412, f"customer is deleted [{where}]")
