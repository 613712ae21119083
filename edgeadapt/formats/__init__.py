"""Every file format and message that two parts share: one module reads and writes each."""
