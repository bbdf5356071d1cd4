"""gunicorn -c gunicorn.conf.py wsgi:application"""

import os

bind = os.environ.get("BIND", "127.0.0.1:8000")
workers = int(os.environ.get("WORKERS", "2"))
# sync, gthread or gevent: the middleware needs nothing of its own in any of them.
worker_class = os.environ.get("WORKER_CLASS", "sync")
threads = 4 if worker_class == "gthread" else 1
# The requests under way and, after them, shutdown_timeout (5 s) for the usage that
# still waits. What has not ended by then is killed: without a spool, usage is lost.
graceful_timeout = 30
# Its place would be the home directory, which the user of a service may not have.
control_socket_disable = True
