"""Quotas that hold between two answers of OpenMeter.

An answer says how much was left at one moment, and knows of usage only some seconds
after it was delivered. Until the next one this package counts down: what was settled
since, and what is in flight, of every thread and process that shares a store.
"""

from openmeter_wsgi.ledger.account import Account as Account
from openmeter_wsgi.ledger.ledger import Ledger as Ledger
from openmeter_wsgi.ledger.opening import open_store as open_store
from openmeter_wsgi.ledger.reservation import Refusal as Refusal
from openmeter_wsgi.ledger.reservation import Reservation as Reservation
from openmeter_wsgi.ledger.terms import Store as Store
