"""What a round is about: its task, what a device contributes, and the next adapter from the sum."""
