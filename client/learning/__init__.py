"""Learning on the device that answers: from a person's corrections, at once, and from its own examples.

Runs on the bare install, and uses no network.
"""

from client.learning.corrections import Correction
from client.learning.language import (
    LanguageLearned,
    LanguagePersonalized,
    personalize_language_model,
    teach_language_model,
)
from client.learning.learner import Answers, Learned, Learner, Personalized, Undone

__all__ = [
    "Answers",
    "Correction",
    "LanguageLearned",
    "LanguagePersonalized",
    "Learned",
    "Learner",
    "Personalized",
    "Undone",
    "personalize_language_model",
    "teach_language_model",
]
