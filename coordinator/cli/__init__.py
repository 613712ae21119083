"""The coordinator's commands: ``edgeadapt audit`` and ``edgeadapt authority``."""
