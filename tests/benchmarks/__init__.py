"""What metering costs, measured beside the bare application in the same run."""
