"""Channels of releases for devices: a repository of The Update Framework, as static files, with a log.

``repository`` makes it, and verifies bundles as a device does. ``history`` audits it and reads neither ``repository``
nor ONNX Runtime, so nothing is imported here.
"""
