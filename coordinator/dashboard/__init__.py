"""What an operator sees of a running federation: a live page, and Prometheus metrics."""

__all__: list[str] = []
