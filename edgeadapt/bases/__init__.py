"""Frozen base models: found, identified, converted, and run as exported graphs. Some modules import torch."""
