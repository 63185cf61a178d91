"""Asks a real API server whether it would take what the chart renders, object by object, and says so of each.

Usage: python dry_run.py SERVERS ETCD RENDERED...        needs PyYAML and openssl
SERVERS: a folder of scripts/kube-apiserver.sh. A server drops the fields that it does not know without a word: here
what it would keep has to be all that it was sent.
"""

import pathlib
import re
import sys

import yaml
from apiserver import NAMESPACE, PLACES, STRANGERS, Server, converted
from cluster import told

UNITS = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def amount(value):
    """A quantity as a number; anything else as it is."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m|[KMGT]i)?", str(value))
    return round(float(found[1]) * UNITS[found[2] or ""], 6) if found else value


def lost(sent, kept, path=""):
    """What was sent and would not be kept, in words. Nothing may be said in several ways: {}, [], null, or no word at all."""
    if not sent and not kept:
        return
    if type(sent) is not type(kept) and isinstance(sent, (dict, list)):
        yield f"{path} is {kept!r} and was {sent!r}"
    elif isinstance(sent, dict):
        for key, value in sent.items():
            yield from lost(value, kept.get(key), f"{path}.{key}")
    elif isinstance(sent, list):
        if len(sent) != len(kept):
            yield f"{path} has {len(kept)} of {len(sent)}"
        for index, (value, other) in enumerate(zip(sent, kept)):
            yield from lost(value, other, f"{path}[{index}]")
    elif amount(sent) != amount(kept):
        yield f"{path} is {kept!r} and was {sent!r}"


def verdict(server, manifest):
    """(word, what was changed or why it is refused)."""
    kind = manifest["kind"]
    if kind in STRANGERS:
        return "left out", STRANGERS[kind]
    if kind not in PLACES:
        return "REFUSED", "tests/helm/apiserver.py knows no place for it"
    known, notes = converted(manifest)
    status, kept = server.ask("POST", server.place(kind, query="dryRun=All"), known)
    if status != 201:
        return "REFUSED", str(kept)
    if problems := list(lost(known, kept)):
        return "REFUSED", "; ".join(problems)
    if kind == "ServiceAccount":  # a pod is taken only when its account is there
        server.ask("POST", server.place(kind), known)
    return ("converted" if notes else "accepted"), "; ".join(notes)


def run(stack, servers, etcd, *rest):
    *rendered, folder = rest
    server = Server(stack, servers, etcd, folder)
    refused, counts = [], {}
    for number, path in enumerate(rendered):
        server.enter(f"{NAMESPACE}-{number}")
        manifests = filter(None, yaml.safe_load_all(pathlib.Path(path).read_text(encoding="utf-8")))
        # Helm's own order, as far as it matters here.
        for manifest in sorted(manifests, key=lambda manifest: manifest["kind"] != "ServiceAccount"):
            word, why = verdict(server, manifest)
            counts[word] = counts.get(word, 0) + 1
            line = f"{pathlib.Path(path).stem}: {word} {manifest['kind']} {manifest['metadata']['name']}{why and ': ' + why}"
            print(line)
            refused += [line] if word == "REFUSED" else []
    print(", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    assert not refused, f"{len(refused)} objects are refused"


if __name__ == "__main__":
    sys.exit(told(run, *sys.argv[1:]))
