#!/usr/bin/env python3
"""Turns files of Anthropic's HH-RLHF into preference pairs (docs/pairs-format.md), on standard output.

Usage: convert.py OBJECTIVE FILE...      OBJECTIVE is helpful or harmless; FILE is .jsonl or .jsonl.gz

A line of HH-RLHF holds two transcripts, "chosen" and "rejected", of turns that begin with "\\n\\nHuman: " or
"\\n\\nAssistant: ". They share all but their last answer; lines where they do not are left out and counted. Which answer
is called a is decided by a digest of the two, so that positions tell nothing.
"""
import gzip
import hashlib
import json
import re
import sys

TURN = re.compile(r"\n\n(Human|Assistant): ?")
ROLES = {"Human": "user", "Assistant": "assistant"}


def turns(transcript):
    parts = TURN.split(transcript)[1:]
    return [{"role": ROLES[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2])]


def pair(line, objective):
    """A pair, or None where the transcripts are no two answers to one conversation."""
    chosen, rejected = (turns(line[side]) for side in ("chosen", "rejected"))
    if not chosen or not rejected or chosen[:-1] != rejected[:-1]:
        return None
    answers = [chosen[-1], rejected[-1]]
    alternating = all(turn["role"] == ("user", "assistant")[i % 2] for i, turn in enumerate(chosen))
    filled = all(turn["content"] for turn in [*chosen, rejected[-1]])
    if not (alternating and filled) or any(answer["role"] != "assistant" for answer in answers):
        return None
    texts = [answer["content"] for answer in answers]
    if texts[0] == texts[1]:
        return None
    swapped = hashlib.sha256("\0".join(texts).encode()).digest()[0] % 2
    a, b = texts[::-1] if swapped else texts
    preferred = {objective: "b" if swapped else "a"}
    return {"messages": chosen[:-1], "response_a": a, "response_b": b, "preferred": preferred}


def main():
    if len(sys.argv) < 3 or sys.argv[1] not in ("helpful", "harmless"):
        sys.exit(__doc__)
    written, seen, left_out = 0, set(), 0
    for name in sys.argv[2:]:
        opened = gzip.open(name, "rt", encoding="utf-8") if name.endswith(".gz") else open(name, encoding="utf-8")
        with opened as lines:
            for line in lines:
                converted = pair(json.loads(line), sys.argv[1])
                text = converted and json.dumps(converted, ensure_ascii=False)
                if not text or text in seen:
                    left_out += 1
                    continue
                seen.add(text)
                print(text)
                written += 1
    print(f"{written} pairs, {left_out} lines left out", file=sys.stderr)


if __name__ == "__main__":
    main()
