"""The first front door: the Generation service, which the SDK and the CLI speak."""
