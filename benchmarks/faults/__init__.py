"""Faults in the real processes of a fleet on loopback: what happened, what was lost, and the time to the next round."""
