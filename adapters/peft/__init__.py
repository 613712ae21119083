"""The folder format of the ``peft`` library: read without torch, peft or pickle, and written back.

The exporter reads adapters from it, and a coordinator its first version.
"""

from adapters.peft.folder import PeftFolder, read_peft, to_peft
from adapters.peft.inputs import AdapterInputs

__all__ = ["AdapterInputs", "PeftFolder", "read_peft", "to_peft"]
