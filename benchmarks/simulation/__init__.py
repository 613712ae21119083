"""The in-process engine, with and without masks, against Flower's own, with the same apps, in the same run."""
