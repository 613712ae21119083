"""What a process has verified, and does not verify again (docs/decisions/0032-verified-once.md)."""

import sys

VERIFIED_ONCE = {
    "aggregation.checks": ("_members", "_serials", "_first_to_expire", "_roster", "_signed"),
    "aggregation.envelope": ("_opened_once",),
    "aggregation.pki.certificates": ("load", "_certified"),
}


def forget_verified() -> None:
    """Be as a new process, such as an auditor's: verify everything again."""
    for module, functions in VERIFIED_ONCE.items():
        if module in sys.modules:
            for name in functions:
                getattr(sys.modules[module], name).cache_clear()
