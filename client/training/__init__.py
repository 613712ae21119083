"""Training on a device: its examples, local training, and the personal adapter."""
