"""Distributed differential privacy: the noise that each device adds, and what the sums reveal in spite of it.

``rounding`` bounds what a device contributes, ``noise`` draws what it adds, ``accounting`` says what is revealed.
"""
