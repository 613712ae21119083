"""What an adapter is, and every file format that two parts share.

Formats: bundles, manifests, DSSE envelopes, adapter files, key files, PEFT folders, registry files, settings. Adapters:
PEFT config, layout, graph inputs, number formats, and the models that are trained. Nothing is exported here, because
some modules import torch and others must run on the bare install: import the module.
"""
