"""Peers (b) and (c): llama.cpp through its Python binding, as well as a practitioner can drive it on a CPU.

(c) decodes the base model alone, n sequences to a batch. (b) is guided decoding by hand: two contexts over one copy of
the weights, the second under another system text for each row, n sequences to a batch in each, and the argmax of
z_base + w · z_reward. Both contexts run at the same time on half of the threads each, or one after the other on all.

Usage: llama_loop.py MODEL PLAN      PLAN: JSON as `compare.py` writes it. Prints one JSON object.
"""

import ctypes
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import llama_cpp as lib
import numpy as np

# Tokens of one prompt and one answer together: more than any prompt here needs.
ROW_TOKENS_MAX = 256

# Tokens that llama.cpp takes in one call; its own default for prompts.
CALL_TOKENS_MAX = 512


class Context:
    """One llama.cpp context with `rows` sequences, each at a position of its own."""

    def __init__(self, model, rows, threads, row_tokens=ROW_TOKENS_MAX):
        params = lib.llama_context_default_params()
        params.n_ctx = rows * row_tokens
        params.n_seq_max = rows
        params.n_batch = params.n_ubatch = CALL_TOKENS_MAX
        params.n_threads = params.n_threads_batch = threads
        self.context = lib.llama_init_from_model(model, params)
        if not self.context:
            sys.exit("llama_loop: no context")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.batch = lib.llama_batch_init(CALL_TOKENS_MAX, 0, 1)
        self.positions = [0] * rows

    def compute(self, rows):
        """Appends the tokens of each row: [(row, tokens)]. Returns logits after the last of each: (rows, vocabulary)."""
        batch, index = self.batch, 0
        for row, tokens in rows:
            for offset, token in enumerate(tokens):
                batch.token[index] = token
                batch.pos[index] = self.positions[row]
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = row
                batch.logits[index] = offset + 1 == len(tokens)
                self.positions[row] += 1
                index += 1
        batch.n_tokens = index
        if lib.llama_decode(self.context, batch) != 0:
            sys.exit("llama_loop: llama_decode failed")
        logits = ctypes.cast(lib.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(logits, shape=(len(rows), self.vocabulary))

    def prefill(self, prompts):
        """Prompts one by one, as servers do; the first tokens' logits: (rows, vocabulary)."""
        return np.stack([self.compute([(row, prompt)])[0].copy() for row, prompt in enumerate(prompts)])

    def step(self, tokens):
        return self.compute([(row, [token]) for row, token in enumerate(tokens)])

    def close(self):
        lib.llama_batch_free(self.batch)
        lib.llama_free(self.context)


def tokenize(model, text):
    data = text.encode()
    tokens = (lib.llama_token * (len(data) + 8))()
    vocab = lib.llama_model_get_vocab(model)
    count = lib.llama_tokenize(vocab, data, len(data), tokens, len(tokens), False, True)
    return list(tokens[:count])


def decode(choose, first, count):
    """`count` tokens for each row; the rate is that of the steps, the prompts left out."""
    tokens = choose(first)
    answers = [[int(token)] for token in tokens]
    began = time.perf_counter()
    for _ in range(count - 1):
        tokens = choose.step(tokens)
        for answer, token in zip(answers, tokens):
            answer.append(int(token))
    seconds = time.perf_counter() - began
    return len(answers) * (count - 1) / seconds, answers


class Greedy:
    """(c): the base model alone."""

    def __init__(self, base):
        self.base = base

    def __call__(self, logits):
        return logits.argmax(axis=1)

    def step(self, tokens):
        return self(self.base.step(tokens))


class Guided:
    """(b): z_base + w · z_reward, w a number for each row."""

    def __init__(self, base, reward, strengths, pool):
        self.base, self.reward, self.pool = base, reward, pool
        self.strengths = np.array(strengths, dtype=np.float32)[:, None]
        self.sum = np.empty((len(strengths), base.vocabulary), dtype=np.float32)

    def __call__(self, logits):
        base, reward = logits
        np.multiply(reward, self.strengths, out=self.sum)
        np.add(self.sum, base, out=self.sum)
        return self.sum.argmax(axis=1)

    def step(self, tokens):
        if self.pool is None:
            return self((self.base.step(tokens), self.reward.step(tokens)))
        reward = self.pool.submit(self.reward.step, tokens)  # llama_decode releases the interpreter's lock
        base = self.base.step(tokens)
        return self((base, reward.result()))


def run(model, case, plan):
    rows, threads = plan["rows"][: case["batch"]], case["threads"]
    if case["kind"] == "prefill":
        tokens = [100 + index * 7 % 5000 for index in range(case["tokens"])]
        base = Context(model, 1, threads, row_tokens=case["tokens"])
        began = time.perf_counter()
        for start in range(0, len(tokens), CALL_TOKENS_MAX):
            base.compute([(0, tokens[start : start + CALL_TOKENS_MAX])])
        rate, answers = len(tokens) / (time.perf_counter() - began), []
        base.close()
        return rate, answers
    prompts = [tokenize(model, row["base"]) for row in rows]
    if case["kind"] == "unguided":
        base = Context(model, len(rows), threads)
        result = decode(Greedy(base), base.prefill(prompts), case["tokens"])
        base.close()
        return result
    together = case["kind"] == "guided, together"
    each = max(threads // 2, 1) if together else threads
    base, reward = Context(model, len(rows), each), Context(model, len(rows), each)
    first = (base.prefill(prompts), reward.prefill([tokenize(model, row["reward"]) for row in rows]))
    with ThreadPoolExecutor(1) as pool:
        guided = Guided(base, reward, [row["strength"] for row in rows], pool if together else None)
        result = decode(guided, first, case["tokens"])
    base.close()
    reward.close()
    return result


def main():
    path, plan = sys.argv[1], json.loads(sys.argv[2])
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, None)
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(path.encode(), params)
    if not model:
        sys.exit(f"llama_loop: cannot load {path}")
    run(model, {"kind": "unguided", "batch": 1, "threads": 1, "tokens": 8}, plan)  # pages in
    results = []
    for case in plan["cases"]:
        rate, answers = run(model, case, plan)
        results.append({**case, "tokens_per_second": rate, "answers": answers})
    system = lib.llama_print_system_info().decode()
    print(json.dumps({"cases": results, "version": lib.__version__, "system": system}))


if __name__ == "__main__":
    main()
