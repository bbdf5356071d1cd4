"""What a response body says about usage, read as it passes."""
