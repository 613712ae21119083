"""Learning from a person's corrections, on the device that answers: the private adapter is tuned and used at once.

Runs on the bare install, and uses no network.
"""

from client.learning.corrections import Correction
from client.learning.learner import Answers, Learned, Learner, Undone

__all__ = ["Answers", "Correction", "Learned", "Learner", "Undone"]
