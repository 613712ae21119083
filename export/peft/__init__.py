"""PEFT folders: read with care, and written back."""
