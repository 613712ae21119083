"""Adapter methods: peft's, Fed-SB, and the models with an adapter that are trained. Some modules import torch."""
