"""The demo: requests go in, usage comes out, and the two are compared.

A sandbox and gunicorn with the Flask example run as processes of their own. What is
to be billed is worked out from what the clients sent and received, and compared with
what the server answers when it is asked for the usage.
"""
