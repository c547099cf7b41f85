#!/usr/bin/env python3
"""Golden logits for tests/engine/model_test.cc, from an implementation that shares nothing with the engine.

Run it from anywhere; it needs numpy only and takes a few seconds:

    python3 tests/golden/generate_golden.py            # rewrites the fixtures beside this file
    python3 tests/golden/generate_golden.py --check    # compares them with what it would write; exit code 1 if they differ
    python3 tests/golden/generate_golden.py --cross-entropy DIR --context N   # of DIR/eval_ids.npy, made at position N and later

What it writes, one directory per case:
    default/        for models/default: tokens.npy [2, 48], logits.npy [2, 48, columns] and columns.npy (every 9th token id),
                    last.npy [2, vocab] (the last position in full)
    <tiny case>/    a whole random model in Hugging Face layout (config.json, safetensors), tokens.npy, logits.npy in full

The forward pass is float64 throughout, straight from the definitions: rotation of pairs as multiplication of complex
numbers, attention as one masked matrix per head, keys and values repeated per query head. The weights are what the files
hold after rounding to their dtype, so that a difference is a difference of arithmetic, not of weights.

How far it can be trusted itself: compared once with Hugging Face transformers 4.44.2 (FlaxLlamaForCausalLM, fp32), its
logits differ by at most 1.9e-6 of the largest on llama_mha_f32, models/default and a public TinyStories Llama, and it
reproduces the cross-entropies that these two models are known for. The Flax model has neither rope_scaling nor biases nor
an explicit head_dim: those rest on the definitions alone, the llama3 frequencies also on the values worked out by hand in
llama_config_test.cc.
"""

import argparse
import json
import pathlib
import struct
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
DEFAULT_MODEL = HERE.parent.parent / "models" / "default"


# --- safetensors -----------------------------------------------------------------------------------------------------


def decode(raw: bytes, dtype: str) -> np.ndarray:
    if dtype == "F32":
        return np.frombuffer(raw, "<f4").astype(np.float64)
    if dtype == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float64)
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    raise ValueError(dtype)


def encode(array: np.ndarray, dtype: str) -> bytes:
    array = np.ascontiguousarray(array, dtype=np.float32)
    if dtype == "F32":
        return array.astype("<f4").tobytes()
    if dtype == "F16":
        return array.astype("<f2").tobytes()
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()  # to nearest, ties to even


def read_safetensors(path: pathlib.Path) -> dict:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        tensors[name] = decode(raw[8 + length + begin : 8 + length + end], info["dtype"]).reshape(info["shape"])
    return tensors


def write_safetensors(path: pathlib.Path, tensors: dict) -> None:
    """tensors: name -> (array, dtype)."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (array, dtype) in sorted(tensors.items(), key=lambda item: (item[1][1] != "F32", item[0])):
        raw = encode(array, dtype)
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_model(directory: pathlib.Path):
    config = json.loads((directory / "config.json").read_text())
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weights = {}
        for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            weights.update(read_safetensors(directory / shard))
    else:
        weights = read_safetensors(directory / "model.safetensors")
    return config, weights


# --- the model -------------------------------------------------------------------------------------------------------


def rotary_angles(config: dict, head_dim: int, positions: int) -> np.ndarray:
    """[positions, head_dim / 2], the angle by which pair i of a head turns at each position."""
    frequency = 1.0 / config.get("rope_theta", 10000.0) ** (np.arange(0, head_dim, 2) / head_dim)
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        frequency = frequency / scaling["factor"]
    elif kind == "llama3":
        old_context = scaling["original_max_position_embeddings"]
        low_wavelength = old_context / scaling["low_freq_factor"]
        high_wavelength = old_context / scaling["high_freq_factor"]
        for i, f in enumerate(frequency):
            wavelength = 2 * np.pi / f
            if wavelength > low_wavelength:
                frequency[i] = f / scaling["factor"]
            elif wavelength > high_wavelength:
                smooth = (old_context / wavelength - scaling["low_freq_factor"]) / (
                    scaling["high_freq_factor"] - scaling["low_freq_factor"]
                )
                frequency[i] = (1 - smooth) * f / scaling["factor"] + smooth * f
    elif kind != "default":
        raise ValueError(kind)
    # The engine stores frequencies as float32, as every implementation does.
    return np.outer(np.arange(positions), frequency.astype(np.float32).astype(np.float64))


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * weight


def forward(config: dict, weights: dict, tokens: np.ndarray) -> np.ndarray:
    """Logits [positions, vocab] of one sequence that starts at position 0."""
    n = len(tokens)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    epsilon = config["rms_norm_eps"]
    turn = np.exp(1j * rotary_angles(config, head_dim, n))[:, None, :]  # [n, 1, head_dim / 2]
    visible = np.tril(np.ones((n, n), dtype=bool))

    def linear(x, name):
        y = x @ weights[name + ".weight"].T
        bias = weights.get(name + ".bias")
        return y if bias is None else y + bias

    def rotate(x):  # [n, heads, head_dim]: element i and element i + head_dim/2 are one complex number
        half = head_dim // 2
        z = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        normed = rms_norm(x, weights[prefix + "input_layernorm.weight"], epsilon)
        query = rotate(linear(normed, prefix + "self_attn.q_proj").reshape(n, heads, head_dim))
        key = rotate(linear(normed, prefix + "self_attn.k_proj").reshape(n, kv_heads, head_dim))
        value = linear(normed, prefix + "self_attn.v_proj").reshape(n, kv_heads, head_dim)
        key = np.repeat(key, heads // kv_heads, axis=1)
        value = np.repeat(value, heads // kv_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(head_dim)
        scores = np.where(visible, scores, -np.inf)
        share = np.exp(scores - scores.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", share, value).reshape(n, heads * head_dim)
        x = x + linear(attended, prefix + "self_attn.o_proj")
        normed = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], epsilon)
        gate = linear(normed, prefix + "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(normed, prefix + "mlp.up_proj"), prefix + "mlp.down_proj")
    x = rms_norm(x, weights["model.norm.weight"], epsilon)
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    return x @ weights[head].T


# --- the tiny models -------------------------------------------------------------------------------------------------

LLAMA3_ROPE = {  # an original context so short that 16 dimensions fall into all three bands
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Name -> what differs from BASE, the dtype of the matrices, the dtype of norms and biases, the number of shards.
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 83,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
CASES = {
    "llama_mha_f32": ({}, "F32", "F32", 1),
    "llama3_gqa2_bf16": (
        {"num_key_value_heads": 2, "head_dim": 16, "rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE,
         "tie_word_embeddings": True, "eos_token_id": [2, 5]},
        "BF16", "BF16", 1),
    "linear_gqa4_f16": (
        {"num_key_value_heads": 1, "head_dim": 6, "hidden_size": 36, "rope_scaling": {"type": "linear", "factor": 4.0}},
        "F16", "F16", 1),
    "qwen2_bias_sharded_f32": (
        {**QWEN2, "num_key_value_heads": 2, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
         "use_sliding_window": False, "sliding_window": 64, "max_window_layers": 2},
        "F32", "F32", 3),
    "mistral_gqa2_mixed": (
        {**MISTRAL, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 64}, "BF16", "F32", 2),
    "llama_all_biases_f16": (
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "intermediate_size": 45}, "F16", "F32", 1),
}
TINY_TOKENS = (2, 40)


def random_weights(config: dict, rng: np.random.Generator, matrix_dtype: str, vector_dtype: str) -> dict:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    tensors = {}

    def matrix(name, rows, cols, bias=False):
        tensors[name + ".weight"] = (rng.normal(size=(rows, cols)) * 1.5 / np.sqrt(cols), matrix_dtype)
        if bias:
            tensors[name + ".bias"] = (rng.normal(size=rows) * 0.5, vector_dtype)

    def norm(name):
        tensors[name + ".weight"] = (1 + 0.3 * rng.normal(size=hidden), vector_dtype)

    qkv_bias = config["model_type"] == "qwen2" or config.get("attention_bias", False)
    matrix("model.embed_tokens", vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        norm(prefix + "input_layernorm")
        matrix(prefix + "self_attn.q_proj", heads * head_dim, hidden, qkv_bias)
        matrix(prefix + "self_attn.k_proj", kv_heads * head_dim, hidden, qkv_bias)
        matrix(prefix + "self_attn.v_proj", kv_heads * head_dim, hidden, qkv_bias)
        matrix(prefix + "self_attn.o_proj", hidden, heads * head_dim, config.get("attention_bias", False))
        norm(prefix + "post_attention_layernorm")
        matrix(prefix + "mlp.gate_proj", inner, hidden, config.get("mlp_bias", False))
        matrix(prefix + "mlp.up_proj", inner, hidden, config.get("mlp_bias", False))
        matrix(prefix + "mlp.down_proj", hidden, inner, config.get("mlp_bias", False))
        # Old checkpoints carry this table; a reader must not stumble over it.
        tensors[prefix + "self_attn.rotary_emb.inv_freq"] = (np.ones(head_dim // 2), "F32")
    norm("model.norm")
    if not config["tie_word_embeddings"]:
        matrix("lm_head", vocab, hidden)
    return tensors


def write_model(directory: pathlib.Path, config: dict, tensors: dict, shards: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + i * shards // len(names):05}-of-{shards:05}.safetensors"
                  for i, name in enumerate(names)}
    for shard in sorted(set(weight_map.values())):
        write_safetensors(directory / shard, {name: tensors[name] for name in names if weight_map[name] == shard})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_all(root: pathlib.Path) -> None:
    for seed, (name, (changes, matrix_dtype, vector_dtype, shards)) in enumerate(CASES.items()):
        rng = np.random.default_rng(1000 + seed)
        config = {**BASE, **changes}
        write_model(root / name, config, random_weights(config, rng, matrix_dtype, vector_dtype), shards)
        config, weights = read_model(root / name)
        tokens = rng.integers(0, config["vocab_size"], size=TINY_TOKENS, dtype=np.int32)
        logits = np.stack([forward(config, weights, prompt) for prompt in tokens])
        np.save(root / name / "tokens.npy", tokens)
        np.save(root / name / "logits.npy", logits.astype(np.float32))

    config, weights = read_model(DEFAULT_MODEL)
    tokens = np.load(DEFAULT_MODEL / "eval_ids.npy")[:2, :48].astype(np.int32)
    logits = np.stack([forward(config, weights, prompt) for prompt in tokens]).astype(np.float32)
    columns = np.arange(0, config["vocab_size"], 9, dtype=np.int32)
    (root / "default").mkdir(parents=True, exist_ok=True)
    np.save(root / "default" / "tokens.npy", tokens)
    np.save(root / "default" / "columns.npy", columns)
    np.save(root / "default" / "logits.npy", logits[:, :, columns])
    np.save(root / "default" / "last.npy", logits[:, -1])


def check() -> int:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        write_all(pathlib.Path(scratch))
        bad = 0
        for path in sorted(pathlib.Path(scratch).rglob("*")):
            if path.is_dir():
                continue
            committed = HERE / path.relative_to(scratch)
            if path.name in ("logits.npy", "last.npy"):  # numpy's matrix product rounds differently from build to build
                same = committed.exists() and np.allclose(np.load(committed), np.load(path), rtol=0, atol=1e-5)
            else:
                same = committed.exists() and committed.read_bytes() == path.read_bytes()
            if not same:
                print(f"{committed}: differs from what this script writes")
                bad = 1
    return bad


def cross_entropy(directory: pathlib.Path, context: int) -> float:
    config, weights = read_model(directory)
    total, count = 0.0, 0
    for ids in np.load(directory / "eval_ids.npy"):
        logits = forward(config, weights, ids)[:-1]
        logits -= logits.max(axis=-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses = -logprobs[np.arange(len(ids) - 1), ids[1:]][context:]
        total, count = total + losses.sum(), count + len(losses)
    return total / count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--cross-entropy", type=pathlib.Path, metavar="DIR", help="print that of DIR/eval_ids.npy")
    parser.add_argument("--context", type=int, default=256, help="first position whose prediction counts (default 256)")
    args = parser.parse_args()
    if args.cross_entropy:
        print(f"{cross_entropy(args.cross_entropy, args.context):.4f}")
        return 0
    if args.check:
        return check()
    write_all(HERE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
