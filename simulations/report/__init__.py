"""The report of a run: terminal table, HTML page with figures, comparison of several runs.

This package imports nothing: the page and its figures need Jinja2 and matplotlib.
"""
