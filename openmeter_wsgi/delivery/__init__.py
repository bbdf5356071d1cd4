"""Delivery: a queue in memory, a worker, a sender and an HTTP client."""
