"""`edgeadapt bench ondevice`: one frozen base with and without an adapter, ours beside torch and llama.cpp.

Each contender runs in a process of its own (``worker.py``), and one at a time has the processor; the rounds go through
all of them in turn, so that a busy machine slows every one of them alike (``race.py``).
"""
