"""Checks that every value of a chart has a default and, in its schema, a description that reads as a sentence.

Usage: python sentences.py CHART        needs PyYAML
"""

import json
import pathlib
import sys

import yaml


def walk(schema, definitions, path):
    """Each property below `schema` with its path and its resolved schema."""
    for name, property_schema in schema.get("properties", {}).items():
        if not isinstance(property_schema, dict):
            continue
        reference = property_schema.get("$ref")
        resolved = definitions[reference.rsplit("/", 1)[1]] if reference else property_schema
        yield f"{path}.{name}".lstrip("."), resolved
        yield from walk(resolved, definitions, f"{path}.{name}")


def main():
    chart = pathlib.Path(sys.argv[1])
    schema = json.loads((chart / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((chart / "values.yaml").read_text(encoding="utf-8"))
    found = []
    for path, resolved in walk(schema, schema["definitions"], ""):
        sentence = resolved.get("description", "")
        if not (sentence[:1].isupper() and sentence.endswith(".") and len(sentence.split()) > 3):
            found.append(f"{path} is described as {sentence!r}")
        parent, names = values, path.split(".")
        # Below these everything is Kubernetes' own.
        if names[-1] == "global" or "resources" in names[:-1]:
            continue
        for name in names:
            if name not in parent:
                found.append(f"{path} has no default in values.yaml")
                break
            parent = parent[name]
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
