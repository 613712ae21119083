"""A TCP proxy on loopback that a test can cut: connections that break, and a network that is away for a while."""

import socket
import threading
from contextlib import suppress

HOST = "127.0.0.1"


class Proxy:
    """Forwards every connection to a port. ``cut`` breaks all of them; while ``away``, new ones are refused."""

    def __init__(self, port: int) -> None:
        self.target, self.away, self.cuts = port, False, 0
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break all connections."""
        with self._lock:
            self.cuts += 1
            broken, self._open = self._open, set()
        for each in broken:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # close alone would not wake the thread that reads
            each.close()

    def close(self) -> None:
        """Stop forwarding."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
                if self.away:
                    inner.close()
                    continue
                outer = socket.create_connection((HOST, self.target))
            except OSError:
                if self._listener.fileno() < 0:
                    return
                continue
            with self._lock:
                self._open |= {inner, outer}
            for pair in ((inner, outer), (outer, inner)):
                threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(2**16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            for each in (source, sink):
                each.close()
