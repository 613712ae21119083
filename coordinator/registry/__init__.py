"""The registry: versions of the shared adapter, signed and content-addressed, and a record of every round."""
