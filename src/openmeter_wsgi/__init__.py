"""Usage metering for WSGI applications, billed by what was delivered."""
