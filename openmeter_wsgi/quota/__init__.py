"""Quotas that hold between two answers of OpenMeter."""
