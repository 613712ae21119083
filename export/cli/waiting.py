"""What a person sees while a step takes long whose share done nobody knows: that it is under way, and for how long."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

EVERY = 0.5  # seconds between two updates


@contextmanager
def waiting(label: str, out: TextIO | None = None) -> Iterator[None]:
    """Show ``label``, and on a terminal the seconds since the start; elsewhere one plain line.

    Args:
        label: What is being done.
        out: Standard error unless told.
    """
    out = out or sys.stderr
    if not out.isatty():
        print(label, file=out)
        yield
        return
    done, start = threading.Event(), time.monotonic()

    def show() -> None:
        while True:
            out.write(f"\r{label} … {time.monotonic() - start:.0f} s")
            out.flush()
            if done.wait(EVERY):
                break
        out.write("\n")

    shown = threading.Thread(target=show, daemon=True)
    shown.start()
    try:
        yield
    finally:
        done.set()
        shown.join()
