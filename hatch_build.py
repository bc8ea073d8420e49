"""Put a software bill of materials into the wheel, made of pyproject.toml when the wheel is built.

CycloneDX 1.6 in ``.dist-info/sboms/`` (PEP 770): the package, and every dependency with the
versions that it may have, by itself or for an extra. The wheel bundles no other code, so that no
version of a dependency is fixed here.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.requirements import Requirement

NAME = "lightning-qat.cdx.json"


class BillOfMaterials(BuildHookInterface):
    """Writes the bill before a wheel is built, and removes it afterwards."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write it; an editable install needs none."""
        if version == "editable" or self.target_name != "wheel":
            return
        core = self.metadata.core
        document = bill_of_materials(
            core.name,
            self.metadata.version,
            core.license_expression,
            [("", core.dependencies), *core.optional_dependencies.items()],
        )
        path = Path(self.directory) / NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        build_data["sbom_files"].append(str(path.resolve()))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what the wheel holds now."""
        (Path(self.directory) / NAME).unlink(missing_ok=True)


def bill_of_materials(
    name: str, version: str, license_expression: str, requirements: list[tuple[str, list[str]]]
) -> dict[str, Any]:
    """A CycloneDX document, the same for the same arguments.

    Args:
        name: Of the package.
        version: Of the package.
        license_expression: Of the package, as SPDX has it.
        requirements: For each extra, ``""`` for none, the requirements.
    """
    package = _purl(name, version)
    components: dict[str, dict[str, Any]] = {}
    for extra, texts in requirements:
        for text in texts:
            requirement = Requirement(text)
            purl = _purl(requirement.name)
            component = components.setdefault(
                purl,
                {
                    "type": "library",
                    "bom-ref": purl,
                    "name": requirement.name,
                    "purl": purl,
                    "scope": "optional",
                    "properties": [],
                },
            )
            if not extra:
                component["scope"] = "required"
            key = f"lightning-qat:requires:{extra}" if extra else "lightning-qat:requires"
            component["properties"].append({"name": key, "value": str(requirement)})
    identity = json.dumps([package, sorted(components), requirements])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, identity)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": package,
                "name": name,
                "version": version,
                "purl": package,
                "licenses": [{"expression": license_expression}],
            }
        },
        "components": [components[purl] for purl in sorted(components)],
        "dependencies": [
            {
                "ref": package,
                "dependsOn": sorted(
                    purl for purl, c in components.items() if c["scope"] == "required"
                ),
            }
        ],
    }


def _purl(name: str, version: str = "") -> str:
    normal = name.lower().replace("_", "-").replace(".", "-")
    return f"pkg:pypi/{normal}@{version}" if version else f"pkg:pypi/{normal}"
