"""A frozen language model with and without an adapter, compared with torch and llama.cpp.

Each contender runs in a process of its own (``process.py``), and one at a time computes. The rounds go through all of
them alternately, so that a busy machine slows all of them alike (``compare.py``).

Nothing is exported here: a contender's process imports its own framework only.
"""
