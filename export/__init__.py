"""The exporter: frozen bases as quantized ONNX graphs, adapters as files, both in signed bundles for devices. Nothing
is exported here: most of the packages below import torch, and a command that adds an adapter does not need it."""
