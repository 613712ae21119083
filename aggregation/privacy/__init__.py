"""Distributed differential privacy: the noise that each device adds, and what the sums reveal in spite of it. ``noise``
bounds what a device contributes and draws what it adds, ``accounting`` says what is revealed."""
