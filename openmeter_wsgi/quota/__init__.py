"""Local quotas: balances that are counted down between two answers of OpenMeter."""
