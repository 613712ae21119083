"""The in-process engine against Flower's own simulation engine, with the same apps, in the same run."""
