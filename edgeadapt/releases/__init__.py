"""Releases for devices: channels in a repository of The Update Framework, with gates, rollouts and rollbacks.
``repository`` makes it and verifies bundles as a device does. ``history`` audits it without ONNX Runtime."""
