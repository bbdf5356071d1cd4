"""Delivery from files in a directory: settled events survive the process."""
