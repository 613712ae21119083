"""What light devices, pages, the gateway and the authority's service share: ``messages`` and ``invitation``."""
