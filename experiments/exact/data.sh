#!/bin/sh
# Makes labelled/pairs.jsonl in the working folder: answers of the demo model, labelled by formulas. run.sh calls it.
set -eu
exec "$UNIARM" label label.toml --out labelled
