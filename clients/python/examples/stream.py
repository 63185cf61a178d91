"""Streams one answer from a cluster of `uniarm up`."""
import sys

import uniarm

with uniarm.Client(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7000") as client:
    objectives = [name for model in client.models().reward for name in model.objectives]
    for event in client.stream("What should I do on a rainy Sunday?", preference=dict.fromkeys(objectives, 1.0)):
        if isinstance(event, uniarm.Tokens):
            print(event.text, end="", flush=True)
    print()
