"""The Python interface: what ``import edgeadapt`` gives, each name of which is loaded when it is used."""
