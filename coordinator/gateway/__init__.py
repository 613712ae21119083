"""The gateway: light devices on the coordinator's grid over gRPC, without Flower on the device. ``hub`` holds who is
there and what is asked of whom, ``server`` is the gRPC service around it, and ``grid`` is the Flower grid that the
ServerApp runs on. The format is ``edgeadapt.formats.gateway``."""
