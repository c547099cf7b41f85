#!/usr/bin/env python3
"""Writes principal_fit/*.npz-like fixtures: principal fits of real attention heads of models/default, by plain numpy.

    python3 tests/golden/generate_principal_fit.py        (needs Debian's python3-numpy only)

The committed ones are of the default model up to e1f52ef. An independent implementation of kernels/principal_fit.h: Householder QR with column pivoting where the backends use
Gram-Schmidt and Cholesky. Each case is one raw file of little-endian values, read by tests/kernels/principal_fit_test.cc:
int32 n, m, held_out, d, count, forced, then float32 keys [n,d], values [n,d], log_mass [n], queries [m,d],
held-out queries [held_out,d], then the answer: int32 chosen [count], float32 values [count,d], log_mass [count], gap
[count] (relative distance of each pivot to the runner-up: small means tied).
"""
import json, os
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
MODEL = os.path.join(HERE, "..", "..", "models", "default")


def load():
    config = json.load(open(os.path.join(MODEL, "config.json")))
    raw = open(os.path.join(MODEL, "model.safetensors"), "rb").read()
    size = int.from_bytes(raw[:8], "little")
    weights = {}
    for name, t in json.loads(raw[8:8 + size]).items():
        if name == "__metadata__":
            continue
        lo, hi = (8 + size + x for x in t["data_offsets"])
        data = np.frombuffer(raw[lo:hi], "<u2").astype(np.uint32) << 16 if t["dtype"] == "BF16" else np.frombuffer(raw[lo:hi], "<u4")
        weights[name] = data.view(np.float32).astype(np.float64).reshape(t["shape"])
    return config, weights


def rotate(x, positions, theta):
    half = x.shape[-1] // 2
    angle = np.asarray(positions)[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], 1)


def heads_of(config, weights, ids, wanted):
    """Un-rotated q [T, heads, d], k and v [T, kv_heads, d] of the wanted layers, with exact attention."""
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    d, theta, eps = config["head_dim"], config["rope_theta"], config["rms_norm_eps"]
    norm = lambda x, w: x / np.sqrt((x * x).mean(1, keepdims=True) + eps) * w
    length, found = len(ids), {}
    x = weights["model.embed_tokens.weight"][ids]
    mask = np.triu(np.full((length, length), -np.inf), 1)
    for layer in range(max(wanted) + 1):
        w = {k.split(f"layers.{layer}.", 1)[1]: v for k, v in weights.items() if f".layers.{layer}." in k}
        h = norm(x, w["input_layernorm.weight"])
        q, k, v = ((h @ w[f"self_attn.{n}_proj.weight"].T).reshape(length, -1, d) for n in "qkv")
        if layer in wanted:
            found[layer] = (q, k, v)
        out = np.empty_like(q)
        for head in range(heads):
            j = head * kv // heads
            s = rotate(q[:, head], range(length), theta) @ rotate(k[:, j], range(length), theta).T / np.sqrt(d) + mask
            s = np.exp(s - s.max(1, keepdims=True))
            out[:, head] = s / s.sum(1, keepdims=True) @ v[:, j]
        x = x + out.reshape(length, -1) @ w["self_attn.o_proj.weight"].T
        h = norm(x, w["post_attention_layernorm.weight"])
        gate, up = h @ w["mlp.gate_proj.weight"].T, h @ w["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["mlp.down_proj.weight"].T
    return found


def pivots_of(a):
    """Order of columns in QR with column pivoting, by Householder reflections, and each pivot's gap to the runner-up."""
    rest, order, gaps = a.copy(), list(range(a.shape[1])), []
    for step in range(min(a.shape)):
        norms = (rest[step:, step:] ** 2).sum(0)
        best = int(norms.argmax())
        others = np.delete(norms, best)
        gaps.append(1 - others.max() / norms[best] if len(others) and norms[best] > 0 else 1.0)
        rest[:, [step, step + best]] = rest[:, [step + best, step]]
        order[step], order[step + best] = order[step + best], order[step]
        v = rest[step:, step].copy()
        v[0] += np.copysign(np.linalg.norm(v), v[0])
        if (v @ v) > 0:
            rest[step:, step:] -= np.outer(2 * v / (v @ v), v @ rest[step:, step:])
    return order, gaps + [0.0] * (a.shape[1] - len(gaps))


def fit(keys, values, log_mass, queries, count, forced, ridge=1e-2, iterations=200):
    s = queries @ keys.T + log_mass
    a = np.exp(s - s.max(1, keepdims=True))
    a /= a.sum(1, keepdims=True)
    pivots, gaps = pivots_of(a)
    chosen, gap = list(range(forced)), [1.0] * forced
    for p, g in zip(pivots, gaps):
        if len(chosen) < count and p >= forced:
            chosen.append(p), gap.append(g)
    # A tie changes every later pivot, so a pivot is as safe as the closest decision before it.
    gap = np.minimum.accumulate(gap)
    rank = np.argsort(chosen)
    chosen, gap = np.array(chosen)[rank], gap[rank]
    part = a[:, chosen]
    gram, rhs = part.T @ part, part.sum(0)
    step = 1 / np.linalg.eigvalsh(gram)[-1]
    w = np.full(count, len(part) / part.sum())
    y, t = w, 1.0
    for _ in range(iterations):
        new = np.maximum(y - (gram @ y - rhs) * step, 0)
        t_new = (1 + np.sqrt(1 + 4 * t * t)) / 2
        y, w, t = new + (t - 1) / t_new * (new - w), new, t_new
    w = np.maximum(w, 1e-8)
    share = part * w
    share /= np.maximum(share.sum(1, keepdims=True), 1e-9)
    base = values[chosen]
    gram = share.T @ share
    gram += np.eye(count) * ridge * np.trace(gram) / count
    fitted = base + np.linalg.solve(gram, share.T @ (a @ values - share @ base))
    return chosen, fitted, log_mass[chosen] + np.log(w), gap


def main():
    config, weights = load()
    ids = np.load(os.path.join(MODEL, "eval_ids.npy"))[0]
    group, d, theta = config["num_attention_heads"] // config["num_key_value_heads"], config["head_dim"], config["rope_theta"]
    rng = np.random.default_rng(7)
    layers, kv_heads = config["num_hidden_layers"], config["num_key_value_heads"]
    middle, last = (layers - 1) // 2, layers - 1
    found = heads_of(config, weights, ids, (0, middle, last))
    #        name            layer head begin end  count forced bias
    cases = [("first_half", 0, 1 % kv_heads, 0, 128, 64, 4, False), ("quarter", middle, 2 % kv_heads, 128, 256, 32, 0, False),
             ("eighth", last, 0, 128, 256, 16, 0, False), ("refit", middle, 0, 0, 96, 24, 4, True)]
    for name, layer, head, begin, end, count, forced, bias in cases:
        q, k, v = (x[begin:end] for x in found[layer])
        raw = q[:, head * group:(head + 1) * group].reshape(-1, d)
        place = lambda: rotate(raw, end + rng.integers(0, 1024, len(raw)), theta) / np.sqrt(d)
        f32 = lambda x: np.ascontiguousarray(x, "<f4")
        keys, values = f32(rotate(k[:, head], range(begin, end), theta)), f32(v[:, head])
        log_mass = f32(rng.normal(0, 1, end - begin) if bias else np.zeros(end - begin))
        queries, held_out = f32(place()), f32(place()[::4])
        chosen, fitted, mass, gap = fit(*(x.astype(np.float64) for x in (keys, values, log_mass, queries)), count, forced)
        with open(os.path.join(HERE, "principal_fit", name + ".bin"), "wb") as out:
            out.write(np.array([len(keys), len(queries), len(held_out), d, count, forced], "<i4").tobytes())
            for x in (keys, values, log_mass, queries, held_out):
                out.write(x.tobytes())
            out.write(chosen.astype("<i4").tobytes())
            for x in (fitted, mass, gap):
                out.write(f32(x).tobytes())
        print(f"{name}: n={len(keys)} m={len(queries)} r={count} smallest gap {gap.min():.2e}")


if __name__ == "__main__":
    main()
