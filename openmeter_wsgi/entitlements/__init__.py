"""Entitlements: whether a request is allowed, with answers kept in a cache."""
