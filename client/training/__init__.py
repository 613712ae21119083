"""Training on a device: its examples, local training, its contribution, and the personal adapter."""
