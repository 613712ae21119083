"""The page that runs a bundle in a browser (``page/``, HTML and JavaScript), and the server of its files."""

from client.browser.server import Site, http_server

__all__ = ["Site", "http_server"]
