"""One step of training a MoSLoRA reward model, as a practitioner would write it in JAX: the peer of `training_speed`.

The same model (SmolLM2's GGUF, widened to f32), the same adapter on q, k and v, the same loss over pairs, and gradients
of the adapter alone. A pair is two sequences, prompt and answer each; the whole batch is one jitted function.
`--logits all` projects every position, `--logits answers` those of the answers only.
"""

import argparse
import functools
import os
import statistics
import time

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="a GGUF file")
parser.add_argument("--pairs", type=int, default=8)
parser.add_argument("--prompt", type=int, default=36)
parser.add_argument("--answer", type=int, default=64)
parser.add_argument("--logits", choices=["all", "answers"], default="all")
parser.add_argument("--steps", type=int, default=3)
arguments = parser.parse_args()

os.environ["JAX_PLATFORMS"] = "cpu"
import gguf
import jax
import jax.numpy as jnp
import numpy as np

HEADS, KV_HEADS, RANK, SCALE = 9, 3, 8, 2.0


def unpermute(weight, heads):
    """llama.cpp interleaves the rows of q and k; rotate halves as Hugging Face does."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read(path):
    reader = gguf.GGUFReader(path)
    tensors = {t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32) for t in reader.tensors}
    layers = []
    for index in range(sum(name.endswith("attn_q.weight") for name in tensors)):
        get = lambda name: tensors[f"blk.{index}.{name}.weight"]
        layers.append({
            "q": unpermute(get("attn_q"), HEADS), "k": unpermute(get("attn_k"), KV_HEADS), "v": get("attn_v"),
            "o": get("attn_output"), "gate": get("ffn_gate"), "up": get("ffn_up"), "down": get("ffn_down"),
            "norm1": get("attn_norm"), "norm2": get("ffn_norm"),
        })
    stacked = {name: jnp.array(np.stack([layer[name] for layer in layers])) for name in layers[0]}
    return stacked, jnp.array(tensors["token_embd.weight"]), jnp.array(tensors["output_norm.weight"])


def norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * weight


def rotate(x, cosines, sines):
    low, high = jnp.split(x, 2, -1)
    return x * cosines + jnp.concatenate([-high, low], -1) * sines


def forward(adapter, frozen, tokens, mixed):
    layers, embedding, last = frozen
    count, length = tokens.shape
    hidden = embedding.shape[1]
    width = hidden // HEADS
    angles = jnp.arange(length)[:, None] * (1.0 / 100000.0 ** (jnp.arange(0, width, 2) / width))[None]
    angles = jnp.concatenate([angles, angles], -1)
    cosines, sines = jnp.cos(angles), jnp.sin(angles)
    mask = jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, -jnp.inf)

    def linear(x, weight, part):
        z = x @ part["a"].T
        gamma, beta = 1.0 + mixed @ part["gamma"].T, mixed @ part["beta"].T
        return x @ weight.T + SCALE * (z * gamma[:, None] + beta[:, None]) @ part["b"].T

    def layer(x, both):
        weights, part = both
        normed = norm(x, weights["norm1"])
        heads = lambda y, n: y.reshape(count, length, n, width).transpose(0, 2, 1, 3)
        q = rotate(heads(linear(normed, weights["q"], part["q"]), HEADS), cosines, sines)
        k = rotate(heads(linear(normed, weights["k"], part["k"]), KV_HEADS), cosines, sines)
        v = heads(linear(normed, weights["v"], part["v"]), KV_HEADS)
        k, v = jnp.repeat(k, HEADS // KV_HEADS, 1), jnp.repeat(v, HEADS // KV_HEADS, 1)
        attention = jax.nn.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(width) + mask, -1) @ v
        x = x + attention.transpose(0, 2, 1, 3).reshape(count, length, hidden) @ weights["o"].T
        normed = norm(x, weights["norm2"])
        return x + (jax.nn.silu(normed @ weights["gate"].T) * (normed @ weights["up"].T)) @ weights["down"].T, None

    x, _ = jax.lax.scan(layer, embedding[tokens], (layers, adapter))
    if arguments.logits == "answers":
        x = x[:, arguments.prompt - 1:]
    return norm(x, last) @ embedding.T


def loss(adapter, frozen, tokens, mixed, preference, signs, margins):
    logits = forward(adapter, frozen, tokens, mixed)
    chosen = tokens[:, arguments.prompt:]
    first = arguments.prompt - 1 if arguments.logits == "all" else 0
    logits = logits[:, first:first + arguments.answer]
    read = jax.nn.log_softmax(logits, -1)
    answers = jnp.take_along_axis(read, chosen[..., None], -1)[..., 0].sum(-1)
    difference = answers[0::2] - answers[1::2]
    each = jax.nn.softplus(-signs * 0.02 * difference[:, None])
    mixture = (preference * margins).sum(-1)
    whole = jax.nn.softplus(-jnp.sign(mixture) * 0.02 * difference)
    return ((preference * each).sum(-1) + 0.5 * whole).sum()


def main():
    frozen = read(arguments.model)
    layers, embedding, _ = frozen
    count, hidden = layers["q"].shape[0], embedding.shape[1]
    draws = np.random.default_rng(0)
    draw = lambda *shape: jnp.array(draws.normal(size=shape, scale=0.02), jnp.float32)
    part = lambda rows: {"a": draw(count, RANK, hidden), "b": draw(count, rows, RANK),
                         "gamma": draw(count, RANK, hidden), "beta": draw(count, RANK, hidden)}
    adapter = {name: part(layers[name].shape[1]) for name in "qkv"}
    tokens = jnp.array(draws.integers(1000, 40000, (2 * arguments.pairs, arguments.prompt + arguments.answer)))
    preference = jnp.tile(jnp.array([[0.3, 0.7]]), (arguments.pairs, 1))
    mixed = jnp.repeat(draw(arguments.pairs, hidden), 2, 0)
    signs = jnp.tile(jnp.array([[1.0, -1.0]]), (arguments.pairs, 1))
    step = jax.jit(functools.partial(jax.value_and_grad(loss)))
    run = lambda: jax.block_until_ready(step(adapter, frozen, tokens, mixed, preference, signs, signs * 0.5))
    run()
    seconds = []
    for _ in range(arguments.steps):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    rate = tokens.size / statistics.median(seconds)
    print(f"jax {jax.__version__}, logits of {arguments.logits} positions: {rate:.0f} tokens/s, "
          f"{statistics.median(seconds):.2f} s a step")


main()
