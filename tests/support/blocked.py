"""Processes in which what a device does not have cannot be imported, whatever starts them."""

from pathlib import Path

ABSENT = ("accelerate", "gguf", "onnx", "peft", "torch", "transformers")  # of the extras ``train`` and ``export``
STARTED = "started"  # in the folder: the command line of each such process
SITE = f'''
import sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ImportError(f"{{name}} is not on this device")

sys.meta_path.insert(0, Absent())
with (Path(__file__).parent / "{STARTED}").open("a") as started:
    started.write(" ".join(sys.orig_argv) + "\\n")
'''


def without_torch(folder: Path) -> dict[str, str]:
    """The environment variables of such processes. Python imports ``sitecustomize`` first, also in their children.

    Args:
        folder: New; ``started`` there lists the processes.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE)
    return {"PYTHONPATH": str(folder)}
