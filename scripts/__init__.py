"""What a newcomer runs: set-up, quickstart, checks, and the loopback Hub they need."""
