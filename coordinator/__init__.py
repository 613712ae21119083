"""The coordinator of a federation: sessions, rounds, the server's step, registry, gateway and dashboard. Nothing is
exported here, because parts of this package are imported on the bare install."""
