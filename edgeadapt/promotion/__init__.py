"""Whether a release ships, and whether it stays: the gates before a promotion, and evaluations after it."""
