"""Learning on the device that answers: from a person's corrections, at once, and from its own examples.

It runs on the bare install, and uses no network.
"""

from client.learning.corrections import Correction
from client.learning.learner import Answers, Learned, Learner, Personalized, TextBits, Undone

__all__ = ["Answers", "Correction", "Learned", "Learner", "Personalized", "TextBits", "Undone"]
