"""Readers that extract usage from a response body while its chunks are sent."""
