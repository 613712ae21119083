"""What a device trains: examples, local training, its contribution, and the private adapter."""
