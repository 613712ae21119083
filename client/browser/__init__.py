"""The page that runs a bundle in a browser (``page/``, HTML and JavaScript), and the server of its files."""

from client.browser.server import Site, server

__all__ = ["Site", "server"]
