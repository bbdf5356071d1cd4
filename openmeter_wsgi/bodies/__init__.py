"""Readers of usage in response bodies, while these pass."""
