"""Bundles: writing, extending and reading back the folder that a device opens."""
