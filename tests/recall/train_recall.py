#!/usr/bin/env python3
"""Trains the small recall model beside this file: a two-layer Llama that answers with the value of a key it has read.

  python3 train_recall.py OUT_DIR [--seed 1]      numpy; some minutes of one core

A sequence is pairs of a key (ids 0..63) and its value (ids 64..127); which value belongs to which key is new in every
sequence, so the only way to predict the value of a key is to find the key's earlier pair. OUT_DIR gets config.json and
model.safetensors (BF16) in Hugging Face layout, and calibration_ids.npy and eval_ids.npy: all 64 pairs in random order (128
tokens), then 32 of them again. The gradients are written out by hand, as the forward pass is: read the two side by side.
"""
import argparse
import json
import os
import time

import numpy as np

KEYS, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 64, 64, 2, 4, 2, 32, 128
GROUP, VOCAB, THETA, EPS = HEADS // KV_HEADS, 2 * KEYS, 10000.0, 1e-5
# (steps, pairs of keys to draw from, pairs per sequence, sequences per step)
SCHEDULE = [(250, 8, 24, 64), (250, 16, 48, 32), (300, 32, 80, 24), (500, 64, 96, 20)]
PEAK_RATE, WARM_UP = 3e-3, 50


# ------------------------------------------------------------------------------------------------ data
def draw_pairs(rng, sequences, keys, pairs):
    """Keys drawn at random. Returns ids [sequences, 2 * pairs] and where a key comes again, so that its value is known."""
    chosen = np.argsort(rng.random((sequences, KEYS)), 1)[:, :keys]
    value_of = rng.integers(0, KEYS, (sequences, KEYS))
    key = np.take_along_axis(chosen, rng.integers(0, keys, (sequences, pairs)), 1)
    seen = (key[:, :, None] == key[:, None, :]) & np.tri(pairs, pairs, -1, dtype=bool)
    return interleave(key, np.take_along_axis(value_of, key, 1)), seen.any(2)


def ask_pairs(rng, sequences, asked):
    """All keys once in random order, then `asked` of them again in another order: what the tests use."""
    key = np.argsort(rng.random((sequences, KEYS)), 1)
    key = np.concatenate([key, np.argsort(rng.random((sequences, KEYS)), 1)[:, :asked]], 1)
    value_of = rng.integers(0, KEYS, (sequences, KEYS))
    again = np.arange(KEYS + asked) >= KEYS
    return interleave(key, np.take_along_axis(value_of, key, 1)), np.broadcast_to(again, key.shape)


def interleave(key, value):
    return np.stack([key, value + KEYS], 2).reshape(len(key), -1)


# ------------------------------------------------------------------------------------------------ model
def initial(rng):
    def matrix(rows, columns):
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
    p = {"model.embed_tokens.weight": (0.5 * rng.standard_normal((VOCAB, WIDTH))).astype(np.float32),
         "model.norm.weight": np.ones(WIDTH, np.float32)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        p[name + "input_layernorm.weight"] = np.ones(WIDTH, np.float32)
        p[name + "post_attention_layernorm.weight"] = np.ones(WIDTH, np.float32)
        p[name + "self_attn.q_proj.weight"] = matrix(HEADS * HEAD_DIM, WIDTH)
        p[name + "self_attn.k_proj.weight"] = matrix(KV_HEADS * HEAD_DIM, WIDTH)
        p[name + "self_attn.v_proj.weight"] = matrix(KV_HEADS * HEAD_DIM, WIDTH)
        p[name + "self_attn.o_proj.weight"] = 0.5 * matrix(WIDTH, HEADS * HEAD_DIM)
        p[name + "mlp.gate_proj.weight"] = matrix(MLP, WIDTH)
        p[name + "mlp.up_proj.weight"] = matrix(MLP, WIDTH)
        p[name + "mlp.down_proj.weight"] = 0.5 * matrix(WIDTH, MLP)
    begin_with_a_previous_token_head(p)
    return p


def begin_with_a_previous_token_head(p):
    """A value can only be found by its key once it knows which token came before it. Models do learn that, after a plateau of
    thousands of steps; here the first head begins there: a constant in every embedding asks for the position before its own."""
    embed = p["model.embed_tokens.weight"]
    embed *= 0.5 * np.sqrt(WIDTH) / np.linalg.norm(embed, axis=1, keepdims=True)
    embed[:, 0] = 1
    angle = THETA ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    for part, phase in (("q", 0.0), ("k", 1.0)):
        rows = p[f"model.layers.0.self_attn.{part}_proj.weight"][:HEAD_DIM]
        rows *= 0.05
        fast = 4 * (angle > 0.1)  # slow pairs tell nothing about one step
        rows[:, 0] = np.concatenate([fast * np.cos(phase * angle), fast * np.sin(phase * angle)])


def norm(x, weight):
    scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
    return x * scale * weight, scale


def norm_back(grad, x, weight, scale):
    """Gradients of x and of weight."""
    unit = x * scale
    d = grad * weight
    return scale * (d - unit * (d * unit).mean(-1, keepdims=True)), (grad * unit).reshape(-1, WIDTH).sum(0)


def rope(x, cos, sin):
    """x [..., length, head_dim], half-split pairs. With -sin it is its own inverse, and its gradient."""
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def split_heads(x, sequences, heads):
    return x.reshape(sequences, -1, heads, HEAD_DIM).transpose(0, 2, 1, 3)


def join_heads(x):
    return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1] * HEAD_DIM)


def forward(p, ids):
    """Hidden states [tokens, width] behind the last norm, and what the way back needs."""
    n, length = ids.shape
    angle = np.arange(length)[:, None] * THETA ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    hidden_later = np.triu(np.full((length, length), -1e9, np.float32), 1)
    x, tape = p["model.embed_tokens.weight"][ids.reshape(-1)], []
    for layer in range(LAYERS):
        w = {k.split(".", 3)[3]: v for k, v in p.items() if k.startswith(f"model.layers.{layer}.")}
        h, scale = norm(x, w["input_layernorm.weight"])
        q = rope(split_heads(h @ w["self_attn.q_proj.weight"].T, n, HEADS), cos, sin)
        k = rope(split_heads(h @ w["self_attn.k_proj.weight"].T, n, KV_HEADS), cos, sin)
        v = split_heads(h @ w["self_attn.v_proj.weight"].T, n, KV_HEADS)
        q = q.reshape(n, KV_HEADS, GROUP, length, HEAD_DIM)
        a = q @ k[:, :, None].swapaxes(-1, -2)
        a *= HEAD_DIM ** -0.5
        a += hidden_later
        a -= a.max(-1, keepdims=True)
        np.exp(a, out=a)
        a /= a.sum(-1, keepdims=True)
        o = join_heads((a @ v[:, :, None]).reshape(n, HEADS, length, HEAD_DIM))
        y = x + o @ w["self_attn.o_proj.weight"].T
        h2, scale2 = norm(y, w["post_attention_layernorm.weight"])
        gate, up = h2 @ w["mlp.gate_proj.weight"].T, h2 @ w["mlp.up_proj.weight"].T
        share = 1 / (1 + np.exp(-gate))
        m = gate * share * up
        tape.append((w, x, h, scale, q, k, v, a, o, y, h2, scale2, gate, up, share, m))
        x = y + m @ w["mlp.down_proj.weight"].T
    out, scale = norm(x, p["model.norm.weight"])
    return out, (n, cos, sin, tape, x, scale)


def attention_back(grad, g, w, name, n, cos, sin, h, q, k, v, a, o):
    """grad: of the attention block's output. Adds to g, returns the gradient of h."""
    g[name + "self_attn.o_proj.weight"] = grad.T @ o
    d_o = split_heads(grad @ w["self_attn.o_proj.weight"], n, HEADS).reshape(q.shape)
    d_v = (a.swapaxes(-1, -2) @ d_o).sum(2)
    d_a = d_o @ v[:, :, None].swapaxes(-1, -2)
    d_a -= (d_a * a).sum(-1, keepdims=True)
    d_a *= a
    d_a *= HEAD_DIM ** -0.5
    d_q = (d_a @ k[:, :, None]).reshape(n, HEADS, -1, HEAD_DIM)
    d_k = (d_a.swapaxes(-1, -2) @ q).sum(2)
    d_h = 0
    for part, d in (("q", rope(d_q, cos, -sin)), ("k", rope(d_k, cos, -sin)), ("v", d_v)):
        d = join_heads(d)
        g[name + f"self_attn.{part}_proj.weight"] = d.T @ h
        d_h = d_h + d @ w[f"self_attn.{part}_proj.weight"]
    return d_h


def backward(p, ids, kept, grad):
    """grad [tokens, width]: of what forward() returned. Returns the gradient of every weight, but for the embedding as output."""
    n, cos, sin, tape, x, scale = kept
    g = {}
    grad, g["model.norm.weight"] = norm_back(grad, x, p["model.norm.weight"], scale)
    for layer in reversed(range(LAYERS)):
        name = f"model.layers.{layer}."
        w, x, h, scale, q, k, v, a, o, y, h2, scale2, gate, up, share, m = tape[layer]
        g[name + "mlp.down_proj.weight"] = grad.T @ m
        d_m = grad @ w["mlp.down_proj.weight"]
        d_up, d_gate = d_m * gate * share, d_m * up * share * (1 + gate * (1 - share))
        g[name + "mlp.up_proj.weight"], g[name + "mlp.gate_proj.weight"] = d_up.T @ h2, d_gate.T @ h2
        d_h2 = d_up @ w["mlp.up_proj.weight"] + d_gate @ w["mlp.gate_proj.weight"]
        d, g[name + "post_attention_layernorm.weight"] = norm_back(d_h2, y, w["post_attention_layernorm.weight"], scale2)
        grad = grad + d
        d_h = attention_back(grad, g, w, name, n, cos, sin, h, q, k, v, a, o)
        d, g[name + "input_layernorm.weight"] = norm_back(d_h, x, w["input_layernorm.weight"], scale)
        grad = grad + d
    g["model.embed_tokens.weight"] = np.zeros_like(p["model.embed_tokens.weight"])
    np.add.at(g["model.embed_tokens.weight"], ids.reshape(-1), grad)
    return g


def loss_and_gradients(p, ids, again):
    """Cross-entropy of the values of keys that come again, their accuracy, and gradients."""
    hidden, kept = forward(p, ids)
    rows = np.flatnonzero(np.stack([again, np.zeros_like(again)], 2).reshape(-1))  # tokens that are such keys
    target, embed = ids.reshape(-1)[rows + 1], p["model.embed_tokens.weight"]
    logits = hidden[rows] @ embed.T
    logits -= logits.max(1, keepdims=True)
    share = np.exp(logits)
    share /= share.sum(1, keepdims=True)
    at = (np.arange(len(rows)), target)
    loss, right = -np.log(share[at] + 1e-30).mean(), (share.argmax(1) == target).mean()
    share[at] -= 1
    share /= len(rows)
    grad = np.zeros_like(hidden)
    grad[rows] = share @ embed
    g = backward(p, ids, kept, grad)
    g["model.embed_tokens.weight"] += share.T @ hidden[rows]
    return loss, right, g


def train(p, rng):
    first, second = ({k: np.zeros_like(v) for k, v in p.items()} for _ in range(2))
    steps, step, start = sum(s[0] for s in SCHEDULE), 0, time.time()
    for count, keys, pairs, sequences in SCHEDULE:
        for _ in range(count):
            ids, again = draw_pairs(rng, sequences, keys, pairs) if keys < KEYS or step % 2 else ask_pairs(rng, sequences, pairs - KEYS)
            loss, right, g = loss_and_gradients(p, ids, again)
            step += 1
            norm_of_all = np.sqrt(sum(float((v * v).sum()) for v in g.values()))
            rate = PEAK_RATE * min(1, step / WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / steps)))
            for k in p:
                d = g[k] * min(1.0, 1.0 / norm_of_all)
                first[k] = 0.9 * first[k] + 0.1 * d
                second[k] = 0.98 * second[k] + 0.02 * d * d
                p[k] = p[k] - rate * (first[k] / (1 - 0.9 ** step)) / (np.sqrt(second[k] / (1 - 0.98 ** step)) + 1e-8)
            if step % 25 == 0:
                print(f"step {step} of {steps}: {keys} keys, loss {loss:.4f}, accuracy {right:.3f}, {time.time() - start:.0f} s", flush=True)


# ------------------------------------------------------------------------------------------------ files
def to_bf16(x):
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")  # to the nearest, ties to even


def save(p, directory):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name in sorted(p):
        bits = to_bf16(p[name]).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(p[name].shape), "data_offsets": [len(data), len(data) + len(bits)]}
        data += bits
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(directory, "model.safetensors"), "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text + data)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": MLP,
              "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
              "vocab_size": VOCAB, "max_position_embeddings": 256, "rms_norm_eps": EPS, "rope_theta": THETA, "hidden_act": "silu",
              "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
        f.write("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out"), parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    p = initial(rng)
    train(p, rng)
    save(p, args.out)
    for name, sequences in (("calibration", 8), ("eval", 16)):
        ids, again = ask_pairs(rng, sequences, 32)
        print(name, "loss %.4f, accuracy %.4f" % loss_and_gradients(p, ids, again)[:2])
        np.save(os.path.join(args.out, name + "_ids.npy"), ids.astype(np.int32))


if __name__ == "__main__":
    main()
