"""The device: examples, training, contribution, trust, personal adapter, inference session."""
