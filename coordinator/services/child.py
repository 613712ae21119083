"""Run a program as a service: it is asked to stop when its parent is gone, even by ``kill -9``.

    python -m coordinator.services.child MODULE:FUNCTION ARGUMENT…

The parent holds the other end of standard input and writes nothing. The kernel closes it when the parent ends."""

import os
import pkgutil
import signal
import sys
import threading

from coordinator.gateway.places import raise_descriptors


def main() -> None:
    raise_descriptors()  # Flower's SuperLink does not by itself
    threading.Thread(target=_watch, daemon=True).start()
    _, name, *arguments = sys.argv
    sys.argv = [name, *arguments]
    pkgutil.resolve_name(name)()


def _watch() -> None:
    while os.read(0, 1):  # unbuffered: a thread that holds the lock of sys.stdin would break the end of the process
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
