"""Benchmarks that run this project and a named peer on the same work, in the same run.

``secagg`` compares secure aggregation with Flower's SecAgg+, ``ondevice`` a language model with torch and llama.cpp.
``privacy`` has no peer: it compares settings.
Nothing is exported here: the two import different frameworks, and each needs its own only.
"""
