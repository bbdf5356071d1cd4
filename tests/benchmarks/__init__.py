"""Benchmarks: the cost of metering, compared with the bare application in one run."""
