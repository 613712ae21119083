"""The reports of runs and suites: words, terminal, pages and figures."""
