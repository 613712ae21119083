"""The processes that a coordinator's machine runs for its fleet. ``deployment`` makes them from a state directory and
its ``services.toml``, ``supervisor`` starts, restarts and stops them, and ``child`` is what each of them is started
with."""
