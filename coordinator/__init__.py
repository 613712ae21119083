"""The coordinator of a federation: sessions, rounds, the server's step, registry, gateway and dashboard.

Nothing is exported here, because parts of this package are imported on the bare install. The entry points:

    rounds.federate              the rounds over a transport; needs the extra ``coordinator``
    statedir.CoordinatorStateDir the state directory: key, pinned authority, settings, registry, transcripts
    settings.FederationSettings  ``federation.toml``
    registry                     versions and records of rounds
"""
