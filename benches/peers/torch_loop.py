"""Peer (a): the loop of the papers (GenARM, PARM): two PyTorch models, one request at a time, one preference.

Base and reward model are loaded from the same GGUF file, dequantised to f32 by `transformers`, as two models with a KV
cache each, and run one after the other on all threads: log π_base + w · log π_reward, argmax. Another preference is
another process there (its adapter is merged or conditioned at start), so nothing is shared and nothing batched.

It also judges: where two greedy answers part, which token the f32 models choose.

Usage: torch_loop.py MODEL PLAN      PLAN: JSON as `compare.py` writes it. Prints one JSON object.
"""

import copy
import json
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers


def load(path):
    """Model and tokenizer of a GGUF file; kept dequantised in this environment, because that takes half a minute."""
    kept = os.path.join(sys.prefix, "dequantised", os.path.basename(path))
    if not os.path.isdir(kept):
        folder, file = os.path.split(path)
        making = f"{kept}.{os.getpid()}"
        transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(making)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        # It is plain f32 by now, whatever the loader noted of its origin.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(making)
        os.rename(making, kept)
    model = transformers.AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(kept)


@torch.inference_mode()
def decode(base, reward, tokenizer, row, count):
    def prompt(text):
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    inputs, caches = [prompt(row["base"]), prompt(row["reward"])], [None, None]
    answer, began = [], 0.0
    for number in range(count):
        logs = []
        for index, model in enumerate((base, reward)):
            output = model(inputs[index], cache=caches[index], use_cache=True, logits_to_keep=1)
            caches[index] = output.cache
            logs.append(torch.log_softmax(output.logits[:, -1], dim=-1))
        token = (logs[0] + row["strength"] * logs[1]).argmax(dim=-1, keepdim=True)
        inputs = [token, token]
        answer.append(int(token))
        if number == 0:
            began = time.perf_counter()  # the prompts are left out
    return (count - 1) / (time.perf_counter() - began), answer


@torch.inference_mode()
def next_token(model, tokenizer, case):
    """The token after a prefix of the answer, from scratch; one model, because base and reward share their weights."""

    def logits(text):
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        output = model(torch.tensor([prompt + case["prefix"]]), use_cache=False, logits_to_keep=1)
        return torch.log_softmax(output.logits[0, -1], dim=-1)

    guided = logits(case["base"])
    if case["strength"] != 0.0:
        guided = guided + case["strength"] * logits(case["reward"])
    return int(guided.argmax())


def main():
    path, plan = sys.argv[1], json.loads(sys.argv[2])
    base, tokenizer = load(path)
    if "judge" in plan:
        print(json.dumps({"tokens": [next_token(base, tokenizer, case) for case in plan["judge"]]}))
        return
    reward = copy.deepcopy(base)  # weights of its own, as there
    results = []
    for case in plan["cases"]:
        torch.set_num_threads(case["threads"])
        decode(base, reward, tokenizer, plan["rows"][0], 4)  # warms up
        rate, answer = decode(base, reward, tokenizer, plan["rows"][0], case["tokens"])
        results.append({**case, "tokens_per_second": rate, "answers": [answer]})
    print(json.dumps({"cases": results, "version": f"torch {torch.__version__}, transformers {transformers.__version__}"}))


if __name__ == "__main__":
    main()
