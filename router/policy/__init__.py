"""What the router decides, as pure functions of a snapshot."""
