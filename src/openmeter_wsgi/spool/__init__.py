"""Delivery by way of a directory: what is settled survives the process."""
