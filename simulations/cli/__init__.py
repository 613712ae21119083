"""The commands ``edgeadapt demo``, ``simulate``, ``seeds`` and ``bench``, which ``edgeadapt.py`` mounts.

This package imports nothing, so that a command starts without the libraries of the others.
"""
