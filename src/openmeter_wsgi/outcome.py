"""How a response ended."""

#: To its end.
COMPLETED = "completed"
#: The application raised.
FAILED = "failed"
#: The server closed it early, because the client went away.
ABORTED = "aborted"
