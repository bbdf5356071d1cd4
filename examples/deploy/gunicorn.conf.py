"""gunicorn -c gunicorn.conf.py wsgi:application"""

import os

bind = os.environ.get("BIND", "127.0.0.1:8000")
workers = int(os.environ.get("WORKERS", "2"))
# sync, gthread or gevent: the middleware works with each without further settings.
worker_class = os.environ.get("WORKER_CLASS", "sync")
threads = 4 if worker_class == "gthread" else 1
# Time for the running requests and then for the waiting events, which takes up to
# shutdown_timeout (5 s). After that workers are killed: without a spool, usage is lost.
graceful_timeout = 30
# The control socket would be in the home directory, which a service's user may lack.
control_socket_disable = True
