"""Bundles: the folder that a device opens, written and extended. ``edgeadapt.formats.bundle`` reads and verifies them.
``base`` is not imported here, because it imports torch."""

from export.bundle.sources import Origin, from_peft, from_registry
from export.bundle.write import AdapterSource, add, add_adapter, copy_bundle, write_bundle

__all__ = ["AdapterSource", "Origin", "add", "add_adapter", "copy_bundle", "from_peft", "from_registry", "write_bundle"]
