"""Runs `uniarm bench` and its peers in turns on this machine, checks their greedy tokens, and prints the ratios.

Same file of weights, same prompts, same steering of each row, greedy; rates are those of the decode steps, prompts left
out. One round runs everything once; rounds alternate their order, and every ratio is taken within a round, because what
disturbs the machine disturbs both. `run.sh` makes the environments and calls this.
"""

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

# What SmolLM2's template puts before a chat that has no system message.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

GUIDED_BATCHES = [1, 4, 16]
GUIDED_ROWS = ["prompted", "mixed preferences"]
ROLES = ["separate", "fused"]
UNGUIDED_BATCHES = [1, 4, 16, 32]
THREADS = [1, 2]
PREFILL_TOKENS = 512

# Unguided, by batch, and prefill: what we set out to reach (uniarm / peer).
GOALS = {("unguided", 1): 1.0, ("unguided", 16): 2.0, "prefill": 2.5, ("guided", 1): 1.5, ("guided", 16): 2.5, "papers": 20.0}

# A measurement: who, what its rows ask for, how many rows, on how many threads.
Key = collections.namedtuple("Key", "who rows batch threads")


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command[:3])} … failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def numbers(values):
    return ",".join(map(str, values))


class Round:
    """Rates and answers of one turn."""

    def __init__(self, args):
        self.args, self.rates, self.answers, self.versions = args, {}, {}, {}

    def uniarm(self):
        for threads in THREADS:
            step = ["step", "--temperature", "0", "--repeats", "1", "--tokens", str(self.args.tokens), "--answers"]
            self.steps([*step, "--rows", "unguided", "--batch", numbers(UNGUIDED_BATCHES), "--draft-window", "0"], threads)
            context = ["context", "--repeats", "1", "--prompt-tokens", str(PREFILL_TOKENS)]
            result = self.bench(context, threads)
            rate = result["cases"][0]["prefill_tokens_per_second"]["median"]
            self.rates[Key("uniarm", "prefill", 1, threads)] = rate
            if threads == 1:  # base and reward worker have one each
                guided = ["--rows", "prompted,mixed", "--batch", numbers(GUIDED_BATCHES), "--roles", numbers(ROLES)]
                self.steps([*step, *guided, "--draft-window", "auto"], 1)

    def bench(self, words, threads):
        model = ["--model", self.args.model, "--threads", str(threads), "--json"]
        return run([self.args.uniarm, "bench", *words, *model])

    def steps(self, words, threads):
        for case in self.bench(words, threads)["cases"]:
            rows = f"{case['rows']}, {case['roles']}" if case["roles"] else case["rows"]
            key = Key("uniarm", rows, case["batch"], threads)
            self.rates[key] = case["tokens_per_second"]["median"]
            self.answers[key] = case["answers"]

    def llama(self, rows):
        cases = [("unguided", batch, threads) for threads in THREADS for batch in UNGUIDED_BATCHES]
        cases += [(f"guided, {how}", batch, 2) for batch in GUIDED_BATCHES for how in ("together", "in turn")]
        plan = [{"kind": k, "batch": b, "threads": t, "tokens": self.args.tokens} for k, b, t in cases]
        plan += [{"kind": "prefill", "batch": 1, "threads": t, "tokens": PREFILL_TOKENS} for t in THREADS]
        self.peer("llama.cpp", [self.args.llama_python, f"{HERE}/llama_loop.py"], {"rows": rows, "cases": plan})

    def papers(self, rows):
        if self.args.papers_python:
            plan = [{"kind": "guided", "batch": 1, "threads": t, "tokens": self.args.tokens} for t in THREADS]
            self.peer("papers", [self.args.papers_python, f"{HERE}/torch_loop.py"], {"rows": rows, "cases": plan})

    def peer(self, who, command, plan):
        result = run([*command, self.args.model, json.dumps(plan)])
        self.versions[who] = result["version"]
        for case in result["cases"]:
            key = Key(who, case["kind"], case["batch"], case["threads"])
            self.rates[key] = case["tokens_per_second"]
            self.answers[key] = [{"tokens": tokens} for tokens in case["answers"]]


def chat(system, question):
    turns = [("system", system), ("user", question)]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return f"{text}<|im_start|>assistant\n"


def peer_rows(answers):
    """What `uniarm` was asked in each row, as the peers render it."""
    return [
        {
            "base": chat(SYSTEM, answer["question"]),
            "reward": chat(answer.get("reward_system", SYSTEM), answer["question"]),
            "strength": answer.get("strength", 0.0),
        }
        for answer in answers
    ]


def measure(args):
    rounds, rows = [], None
    for number in range(args.repeats):
        print(f"round {number + 1} of {args.repeats}", file=sys.stderr)
        turn = Round(args)
        # The first round asks uniarm first, because its answers say what the rows are asked.
        if rows is None or number % 2 == 0:
            turn.uniarm()
            if rows is None:
                guided = peer_rows(turn.answers[Key("uniarm", "prompted, separate", max(GUIDED_BATCHES), 1)])
                rest = peer_rows(turn.answers[Key("uniarm", "unguided", max(UNGUIDED_BATCHES), 1)])
                rows = guided + rest[len(guided) :]
            turn.llama(rows)
            turn.papers(rows)
        else:
            turn.papers(rows)
            turn.llama(rows)
            turn.uniarm()
        rounds.append(turn)
    return rounds


def best(rounds, keys):
    """Of several ways to do the same, the one with the best median."""
    known = [key for key in keys if all(key in turn.rates for turn in rounds)]
    return max(known, key=lambda key: statistics.median(turn.rates[key] for turn in rounds), default=None)


def comparisons(rounds):
    """(title, ours, theirs, goal), in the order in which they are printed."""
    for threads in THREADS:
        for batch in UNGUIDED_BATCHES:
            ours, theirs = (Key(who, "unguided", batch, threads) for who in ("uniarm", "llama.cpp"))
            yield f"unguided, batch {batch}, {threads} thread(s)", ours, theirs, GOALS.get(("unguided", batch))
        ours, theirs = (Key(who, "prefill", 1, threads) for who in ("uniarm", "llama.cpp"))
        yield f"prefill of {PREFILL_TOKENS}, {threads} thread(s)", ours, theirs, GOALS["prefill"]
    for batch in GUIDED_BATCHES:
        theirs = best(rounds, [Key("llama.cpp", f"guided, {how}", batch, 2) for how in ("together", "in turn")])
        for rows in (f"{rows}, {roles}" for rows in GUIDED_ROWS for roles in ROLES):
            yield f"guided, batch {batch}, {rows}", Key("uniarm", rows, batch, 1), theirs, GOALS.get(("guided", batch))
    papers = best(rounds, [Key("papers", "guided", 1, threads) for threads in THREADS])
    if papers:
        for batch, rows, goal in ((1, "prompted, separate", None), (16, "mixed preferences, separate", GOALS["papers"])):
            yield f"the papers' loop, batch {batch}, {rows}", Key("uniarm", rows, batch, 1), papers, goal


def agreements(turn, args):
    """How far the greedy tokens of each peer go along with ours: sums in 8 bits may tip a near tie."""
    results, apart = [], []
    pairs = [(Key("uniarm", "prompted, separate", b, 1), Key("llama.cpp", "guided, together", b, 2)) for b in GUIDED_BATCHES]
    pairs += [(Key("uniarm", "unguided", b, 1), Key("llama.cpp", "unguided", b, 1)) for b in UNGUIDED_BATCHES]
    pairs.append((Key("uniarm", "prompted, separate", 1, 1), Key("papers", "guided", 1, 1)))
    for ours, theirs in pairs:
        if theirs not in turn.answers:
            continue
        prefixes = [common(mine, other) for mine, other in zip(turn.answers[ours], turn.answers[theirs])]
        length = len(turn.answers[ours][0]["tokens"])
        results.append(
            {
                "rows": ours.rows,
                "batch": ours.batch,
                "peer": theirs.who,
                "identical": prefixes.count(length),
                "of": len(prefixes),
                "mean_prefix": statistics.mean(prefixes),
                "shortest_prefix": min(prefixes),
                "tokens": length,
            }
        )
        answers = zip(turn.answers[ours], turn.answers[theirs], prefixes)
        apart += [(mine, other, prefix) for mine, other, prefix in answers if prefix < length]
    judged = judge(args, apart) if args.papers_python and apart else None
    return {"agreement": results, "judged": judged}


def common(mine, other):
    pairs = list(zip(mine["tokens"], other["tokens"]))
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))


def judge(args, apart):
    """What the f32 models of the papers' loop choose where two answers part."""
    cases = []
    for mine, _, prefix in apart:
        cases.append({**peer_rows([mine])[0], "prefix": mine["tokens"][:prefix]})
    result = run([args.papers_python, f"{HERE}/torch_loop.py", args.model, json.dumps({"judge": cases})])
    counts = {"ours": 0, "theirs": 0, "another": 0}
    for (mine, other, prefix), token in zip(apart, result["tokens"]):
        ours, theirs = token == mine["tokens"][prefix], token == other["tokens"][prefix]
        counts["ours" if ours else "theirs" if theirs else "another"] += 1
    return counts


def report(rounds, args):
    compared = []
    for title, ours, theirs, goal in comparisons(rounds):
        ratios = [turn.rates[ours] / turn.rates[theirs] for turn in rounds]
        of = lambda key: statistics.median(turn.rates[key] for turn in rounds)
        compared.append(
            {
                "comparison": title,
                "uniarm": of(ours),
                "peer": of(theirs),
                "peer_is": f"{theirs.who}, {theirs.rows}, {theirs.threads} thread(s)",
                "ratio": statistics.median(ratios),
                "range": [min(ratios), max(ratios)],
                "goal": goal,
            }
        )
    versions = {who: version for turn in rounds for who, version in turn.versions.items()}
    return {"rounds": len(rounds), "versions": versions, "comparisons": compared, **agreements(rounds[0], args)}


def show(result):
    print(", ".join(f"{who} {version}" for who, version in result["versions"].items()))
    print(f"tokens per second, greedy; medians of {result['rounds']} rounds; ratios are taken within each round\n")
    print(f"{'':52} {'uniarm':>8} {'peer':>8} {'ratio':>7} {'range':>13} {'goal':>5}  peer")
    for c in result["comparisons"]:
        spread, goal = f"{c['range'][0]:.2f} – {c['range'][1]:.2f}", f"{c['goal']:g}" if c["goal"] else "–"
        print(f"{c['comparison']:52} {c['uniarm']:8.1f} {c['peer']:8.1f} {c['ratio']:7.2f} {spread:>13} {goal:>5}  {c['peer_is']}")
    print("\ngreedy tokens that agree with ours, from the first on:")
    for a in result["agreement"]:
        print(
            f"{a['rows']:18} batch {a['batch']:>2}, {a['peer']:9}: {a['identical']} of {a['of']} answers identical, "
            f"prefix {a['mean_prefix']:.1f} of {a['tokens']} tokens on average, {a['shortest_prefix']} at least"
        )
    if result["judged"]:
        ours, theirs, another = (result["judged"][whose] for whose in ("ours", "theirs", "another"))
        print(f"where they part, PyTorch's f32 models choose our token {ours} times, theirs {theirs} times, another {another} times")
    print(
        "\nunguided: llama.cpp alone. guided: two llama.cpp contexts and a sum of logits by hand, the better of both at once "
        "with a thread each and in turn with two;\nour base and reward worker have a thread each, or two between them where they are fused. Peers know no adapter "
        "whose preference differs by row: mixed preferences stand beside their prompted rows.\nthe papers' loop: two "
        "PyTorch models in f32, one request at a time; every further preference is a further process."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uniarm", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--papers-python", default="")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer (32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    result = report(measure(args), args)
    print(json.dumps(result)) if args.json else show(result)


if __name__ == "__main__":
    main()
