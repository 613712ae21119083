"""Learning on the device that answers: from a person's corrections, at once, and from its own examples. It runs on the
bare install, and uses no network."""

from client.learning.learner import Answers, Learned, Learner, Personalized, TextBits, Undone
from client.training.corrections import Correction

__all__ = ["Answers", "Correction", "Learned", "Learner", "Personalized", "TextBits", "Undone"]
