"""The parity gate: an exported base and adapter, measured against the trained model. Imports torch.

``compare`` measures and holds to limits; ``pair`` opens both sides; ``temperature`` calibrates an adapter.
"""
