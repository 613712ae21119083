"""What an operator does between a round and the devices: see where versions are from and where they are, and compare.

It reads the registry of a coordinator and a repository of channels, and may use the parts of the device and of the
exporter, which may not use each other.
"""
