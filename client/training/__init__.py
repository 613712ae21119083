"""Training on a device: its examples, local training, its contribution, and the personal adapter.

``client.training.trainer`` is not exported here, because it imports torch.
"""

from client.training.contribute import Outcome, clip, contribution, require_bounds
from client.training.examples import Example, Score, Split, in_split, read_examples, write_examples
from client.training.limits import TrainingLimits
from client.training.personal import Candidate, Personalization, personalize

__all__ = [
    "Candidate",
    "Example",
    "Outcome",
    "Personalization",
    "Score",
    "Split",
    "TrainingLimits",
    "clip",
    "contribution",
    "in_split",
    "personalize",
    "read_examples",
    "require_bounds",
    "write_examples",
]
