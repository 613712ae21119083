"""The parity gate: an exported pair against the model that was trained."""
