"""Answers on a device, from verified files only. Needs neither torch nor flwr nor transformers."""
