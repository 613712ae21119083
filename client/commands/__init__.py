"""The commands of ``edgeadapt device``, a module each; ``client/cli.py`` imports one when it is called."""
