"""The coordinator of a federation: sessions, rounds, the server's step, registry, audit and enrolment authority.

Nothing is exported here, because an auditor and an authority import this package on the bare install. The entry points:

    rounds.federate              the rounds over a transport; needs the extra ``coordinator``
    statedir.CoordinatorStateDir the state directory: key, pinned authority, settings, registry, transcripts
    settings.FederationSettings  ``federation.toml``
    registry                     versions and records of rounds
    audit                        checks a transcript; bare install
    authority                    certifies and revokes devices; bare install
"""
