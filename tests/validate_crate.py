"""Check a bundle with the public RO-Crate validator, without a network.

.venv/validator/bin/python tests/validate_crate.py FOLDER

The contexts of JSON-LD, which it would fetch, are those that the package rocrate holds; the two checks that a context
can be fetched are left out.
"""

import importlib.resources
import json
import sys

from rocrate_validator import services
from rocrate_validator.models import Severity, ValidationSettings
from rocrate_validator.utils import document_loader

BIOSCHEMAS, RUN = "https://bioschemas.org", "https://w3id.org/ro/terms/workflow-run"
OLDER = {  # terms that RO-Crate 1.1 places elsewhere than the version that rocrate holds
    "ComputationalWorkflow": f"{BIOSCHEMAS}/ComputationalWorkflow",
    "FormalParameter": f"{BIOSCHEMAS}/FormalParameter",
    "input": f"{BIOSCHEMAS}/ComputationalWorkflow#input",
    "output": f"{BIOSCHEMAS}/ComputationalWorkflow#output",
}
HELD = json.loads(importlib.resources.files("rocrate").joinpath("data/ro-crate.jsonld").read_text("utf8"))
CONTEXTS = {
    "https://w3id.org/ro/crate/1.1/context": {"@context": HELD["@context"] | OLDER},
    f"{RUN}/context": {"@context": {term: f"{RUN}#{term}" for term in ("sha256", "resourceUsage")}},
}
NETWORK = ["ro-crate-1.1_3.1", "ro-crate-1.1_3.2"]


def main(folder: str) -> int:
    fetch = document_loader._original_source_to_json

    def load(source, *arguments):
        return (CONTEXTS[str(source)], None) if str(source) in CONTEXTS else fetch(source, *arguments)

    document_loader._original_source_to_json = load
    settings = ValidationSettings(
        rocrate_uri=folder,
        profile_identifier="provenance-run-crate-0.5",
        requirement_severity=Severity.REQUIRED,
        skip_availability_check=True,
        skip_checks=NETWORK,
    )
    issues = services.validate(settings).get_issues()
    print(*(f"{issue.check.identifier} {issue.message} {issue.violatingEntity}" for issue in issues), sep="\n")
    print("not valid" if issues else "valid")
    return 1 if issues else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
