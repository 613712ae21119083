"""A software bill of materials (CycloneDX) of a version: the adapter, its ancestors, its base, and what runs it. The
adapter, each version before it and each exported file in a release have the digests that their signed manifests state.
The packages are those that edgeadapt requires, and what these require in turn, as they are installed here."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType, Pedigree
from cyclonedx.model.contact import OrganizationalEntity
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from edgeadapt.releases.lineage import GovernedVersion

PROGRAM = "edgeadapt"
MODEL, FILE, LIBRARY = ComponentType.MACHINE_LEARNING_MODEL, ComponentType.FILE, ComponentType.LIBRARY


def bill_of_materials(versions: Sequence[GovernedVersion], made: datetime) -> str:
    """Return the bill of the last of ``versions``, from version 0 on, as CycloneDX 1.6 in JSON, dated ``made``."""
    *before, version = versions
    adapter, base = _adapter(version), _base(version)
    adapter.pedigree = Pedigree(ancestors=[_adapter(each) for each in before])
    bom = Bom(serial_number=uuid5(NAMESPACE_URL, f"urn:sha256:{version.manifest.sha256}"))
    bom.metadata.timestamp, bom.metadata.component = made, adapter
    exported = list(_exported(version))
    packages = {found.name: found for found in installed(PROGRAM)}
    components = {name: _package(found) for name, found in packages.items()}
    for component in (base, *exported, *components.values()):
        bom.components.add(component)
    bom.register_dependency(adapter, [base])
    for file in exported:
        bom.register_dependency(file, [adapter, components[PROGRAM]])
    for name, found in packages.items():
        needed = [components[each] for each in _required(found) if each in components]
        bom.register_dependency(components[name], needed)
    text: str = JsonV1Dot6(bom).output_as_string(indent=2)
    return text


def installed(name: str) -> Iterator[Distribution]:
    """Yield a distribution and all that it requires, in turn, of what is installed; each once, without extras."""
    pending, seen = [name], set[str]()
    while pending:
        wanted = pending.pop()
        if wanted in seen:
            continue
        seen.add(wanted)
        try:
            package = distribution(wanted)
        except PackageNotFoundError:  # for another system
            continue
        yield package
        pending += _required(package)


def _required(package: Distribution) -> list[str]:
    """Return the canonical names of what a distribution requires on this system, without extras."""
    wanted = [Requirement(line) for line in package.requires or ()]
    needed = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [canonicalize_name(each.name) for each in needed]


def _adapter(version: GovernedVersion) -> Component:
    manifest = version.manifest
    stated = {
        "signed-by": version.signed_by,
        "round": str(manifest.round),
        "plan": manifest.plan,
        "method": manifest.peft_config.peft_type,
        "base": manifest.base_digest,
        "survivors": str(len(manifest.survivors)),
        "privacy": None if manifest.privacy is None else str(manifest.privacy),
    }
    properties = [Property(name=f"{PROGRAM}:{key}", value=value) for key, value in stated.items() if value is not None]
    return Component(
        name="adapter",
        type=MODEL,
        version=str(manifest.version),
        bom_ref=f"adapter-{manifest.version}",
        hashes=[_sha256(manifest.sha256)],
        properties=properties,
    )


def _base(version: GovernedVersion) -> Component:
    digest = version.manifest.base_digest
    return Component(name="base", type=MODEL, version=digest, bom_ref="base", hashes=[_sha256(digest)])


def _exported(version: GovernedVersion) -> Iterator[Component]:
    for adapter in {each.adapter.sha256: each.adapter for each in version.releases or ()}.values():
        component = Component(
            name=f"{adapter.name}.onnx_adapter",
            type=FILE,
            version=str(adapter.version),
            bom_ref=f"file-{adapter.sha256}",
            hashes=[_sha256(adapter.sha256)],
        )
        if card := adapter.card:
            component.supplier, component.description = OrganizationalEntity(name=card.owner), card.purpose
            component.licenses.add(LicenseExpression(card.license))
            for name, value in (("data", card.data), ("languages", ", ".join(card.languages))):
                component.properties.add(Property(name=f"{PROGRAM}:{name}", value=value))
        yield component


def _package(distribution: Distribution) -> Component:
    name = canonicalize_name(distribution.name)
    url = PackageURL("pypi", None, name, distribution.version)
    return Component(name=name, type=LIBRARY, version=distribution.version, bom_ref=str(url), purl=url)


def _sha256(digest: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)
