"""The folder format of the ``peft`` library: read without torch, peft or pickle, and written back. The exporter reads
adapters from it, and a coordinator its first version. Devices read the names of its tensors (``methods``), so that
nothing is imported here."""
