"""The format between a light device and the coordinator's gateway: gRPC calls, messages, limits.

``gateway.proto`` declares them, ``gateway_pb2`` is generated from it, and ``frames`` decides which bytes are accepted.
"""
