"""The parity gate: an exported base and adapter, measured against the trained model. Imports torch."""
