"""Entitlements: decisions on requests, from answers of OpenMeter and local quotas."""
