"""From a finished event to OpenMeter: queue, sender."""
