"""A demo: send requests to a metered application, and check the billed usage.

A sandbox, and gunicorn with the Flask example, run as separate processes. The expected
usage is computed from the requests and responses of the clients. It is compared with
the usage that the sandbox reports.
"""
