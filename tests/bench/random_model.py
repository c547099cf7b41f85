#!/usr/bin/env python3
"""The same weights as a Hugging Face directory and as a GGUF file, so that two servers can be compared on one model.

    random_model.py random SHAPE OUT [--dtype bf16|f32] [--seed N]   # writes OUT/hf/ and OUT/model-DTYPE.gguf
    random_model.py export HF_DIR OUT.gguf [--dtype bf16|f32]        # a Llama with a SentencePiece tokenizer.model

Needs numpy only. Weights are drawn with a seed per tensor, of a standard deviation 1/sqrt(columns), as after training:
activations keep their size through the layers, and the largest logits are a few units. The vocabulary is made up; both
sides read it as SentencePiece. Quantised GGUF files come from llama.cpp's llama-quantize.
"""

import argparse
import json
import pathlib
import struct
import zlib

import gguf_file
import numpy as np

SHAPES = {
    # A model for tests: quantised rows need multiples of 256.
    "tiny": dict(hidden=256, inner=512, layers=2, heads=4, kv_heads=2, head_dim=64, vocab=600, positions=512,
                 theta=10000.0, tied=False, scaling=None),
    "tinyllama-1.1b": dict(hidden=2048, inner=5632, layers=22, heads=32, kv_heads=4, head_dim=64, vocab=32000,
                           positions=2048, theta=10000.0, tied=False, scaling=None),
    "llama-3.2-1b": dict(hidden=2048, inner=8192, layers=16, heads=32, kv_heads=8, head_dim=64, vocab=128256,
                         positions=131072, theta=500000.0, tied=True,
                         scaling=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                      original_max_position_embeddings=8192)),
}


# --- a vocabulary as SentencePiece's model proto ---------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


def field(number: int, value) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def made_up_pieces(count: int) -> list:
    """(text, score, type): specials, bytes, then every word over the alphabet, short ones first."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256)]
    letters = "▁etaoinshrdlcumwfgypbvkjxqz"
    words = list(letters)
    start = 0
    while len(pieces) + len(words) < count:
        end = len(words)
        words += [word + letter for word in words[start:end] for letter in letters[1:]]
        start = end
    words = words[: count - len(pieces)]
    return pieces + [(word, -float(i), NORMAL) for i, word in enumerate(words)]


def sentencepiece_model(pieces: list) -> bytes:
    out = bytearray()
    for text, score, kind in pieces:
        out += field(1, field(1, text.encode()) + field(2, score) + field(3, kind))
    trainer = field(3, 2) + field(35, 1) + field(40, 0) + field(41, 1) + field(42, 2)  # BPE, byte fallback, ids
    out += field(2, trainer)
    return bytes(out + field(3, field(1, b"identity") + field(3, 1) + field(4, 0) + field(5, 1)))


def fields_of(raw: bytes):
    """(number, value) of a protobuf message; varints as int, fixed32 as float, the rest as bytes."""
    at = 0

    def read_varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(raw):
        tag = read_varint()
        if tag & 7 == 0:
            value = read_varint()
        else:
            size = {1: 8, 5: 4}.get(tag & 7) or read_varint()
            value, at = raw[at : at + size], at + size
            if tag & 7 == 5:
                (value,) = struct.unpack("<f", value)
        yield tag >> 3, value


def tokenizer_metadata(model: bytes) -> dict:
    """tokenizer.model as the keys that GGUF files have for it."""
    tokens, scores, types = [], [], []
    normalizer = {3: 1, 4: 1}  # add_dummy_prefix, remove_extra_whitespaces: the proto's defaults
    for number, value in fields_of(model):
        if number == 1:
            piece = {2: 0.0, 3: NORMAL} | dict(fields_of(value))
            tokens.append(piece[1])
            scores.append(piece[2])
            types.append(piece[3])
        elif number == 3:
            normalizer |= dict(fields_of(value))
    ids = {name: tokens.index(text) for name, text in (("unknown", b"<unk>"), ("bos", b"<s>"), ("eos", b"</s>"))}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.add_space_prefix": bool(normalizer[3]),
        "tokenizer.ggml.remove_extra_whitespaces": bool(normalizer[4]),
        **{f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()},
    }
    if normalizer.get(2):
        metadata["tokenizer.ggml.precompiled_charsmap"] = np.frombuffer(normalizer[2], np.uint8)
    return metadata


# --- the two forms ---------------------------------------------------------------------------------------------------


def shape_of_config(config: dict) -> dict:
    heads = config["num_attention_heads"]
    return dict(hidden=config["hidden_size"], inner=config["intermediate_size"], layers=config["num_hidden_layers"],
                heads=heads, kv_heads=config.get("num_key_value_heads", heads),
                head_dim=config.get("head_dim") or config["hidden_size"] // heads, vocab=config["vocab_size"],
                positions=config["max_position_embeddings"], theta=config.get("rope_theta", 10000.0),
                tied=config.get("tie_word_embeddings", False), scaling=config.get("rope_scaling"),
                eps=config["rms_norm_eps"])


def config_of_shape(s: dict, dtype: str) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": s["hidden"],
        "intermediate_size": s["inner"], "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"],
        "num_key_value_heads": s["kv_heads"], "head_dim": s["head_dim"], "vocab_size": s["vocab"],
        "max_position_embeddings": s["positions"], "rms_norm_eps": s["eps"], "rope_theta": s["theta"],
        "rope_scaling": s["scaling"], "hidden_act": "silu", "tie_word_embeddings": s["tied"], "bos_token_id": 1,
        "eos_token_id": 2, "torch_dtype": {"bf16": "bfloat16", "f32": "float32"}[dtype],
    }


def tensors_of(s: dict) -> list:
    """(Hugging Face name, GGUF name, shape, heads whose rows are interleaved in GGUF)."""
    query, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    out = [("model.embed_tokens", "token_embd", (s["vocab"], s["hidden"]), 0)]
    for i in range(s["layers"]):
        ours, theirs = f"model.layers.{i}.", f"blk.{i}."
        out += [
            (ours + "input_layernorm", theirs + "attn_norm", (s["hidden"],), 0),
            (ours + "self_attn.q_proj", theirs + "attn_q", (query, s["hidden"]), s["heads"]),
            (ours + "self_attn.k_proj", theirs + "attn_k", (kv, s["hidden"]), s["kv_heads"]),
            (ours + "self_attn.v_proj", theirs + "attn_v", (kv, s["hidden"]), 0),
            (ours + "self_attn.o_proj", theirs + "attn_output", (s["hidden"], query), 0),
            (ours + "post_attention_layernorm", theirs + "ffn_norm", (s["hidden"],), 0),
            (ours + "mlp.gate_proj", theirs + "ffn_gate", (s["inner"], s["hidden"]), 0),
            (ours + "mlp.up_proj", theirs + "ffn_up", (s["inner"], s["hidden"]), 0),
            (ours + "mlp.down_proj", theirs + "ffn_down", (s["hidden"], s["inner"]), 0),
        ]
    out.append(("model.norm", "output_norm", (s["hidden"],), 0))
    if not s["tied"]:
        out.append(("lm_head", "output", (s["vocab"], s["hidden"]), 0))
    return [(ours + ".weight", theirs + ".weight", shape, heads) for ours, theirs, shape, heads in out]


def draw(name: str, shape: tuple, seed: int) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.standard_normal(shape, dtype=np.float32)
    return values * np.float32(shape[1] ** -0.5)


def write_safetensors(path, tensors: list, dtype: str, produce):
    width = {"bf16": 2, "f32": 4}[dtype]
    header, offset = {}, 0
    for name, _, shape, _ in tensors:
        size = int(np.prod(shape)) * width
        header[name] = {"dtype": dtype.upper(), "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 64)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, _, shape, _ in tensors:
            values = produce(name, shape)
            file.write((gguf_file.to_bf16(values) if dtype == "bf16" else values.astype("<f4")).tobytes())


def llama3_divisors(s: dict) -> np.ndarray:
    """What Llama 3.1 divides each rotary frequency by, in the order of the pairs (rope_freqs.weight)."""
    scaling = s["scaling"]
    frequency = s["theta"] ** (-2.0 * np.arange(s["head_dim"] // 2) / s["head_dim"])
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / (kept + (1.0 - kept) / scaling["factor"])).astype(np.float32)


def write_gguf(path, s: dict, tokenizer: dict, tensors: list, dtype: str, produce):
    metadata = {
        "general.architecture": "llama",
        "general.name": pathlib.Path(path).stem,
        "general.file_type": {"f32": 0, "bf16": 32}[dtype],
        "llama.vocab_size": s["vocab"],
        "llama.context_length": s["positions"],
        "llama.embedding_length": s["hidden"],
        "llama.block_count": s["layers"],
        "llama.feed_forward_length": s["inner"],
        "llama.rope.dimension_count": s["head_dim"],
        "llama.rope.freq_base": float(s["theta"]),
        "llama.attention.head_count": s["heads"],
        "llama.attention.head_count_kv": s["kv_heads"],
        "llama.attention.key_length": s["head_dim"],
        "llama.attention.value_length": s["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": float(s["eps"]),
        **tokenizer,
    }
    kind = {"bf16": gguf_file.BF16, "f32": gguf_file.F32}[dtype]

    def producer(name, shape, heads):
        return lambda: gguf_file.interleave(produce(name, shape), heads) if heads else produce(name, shape)

    entries = [(theirs, shape, gguf_file.F32 if len(shape) == 1 else kind, producer(ours, shape, heads))
               for ours, theirs, shape, heads in tensors]
    scaling = s["scaling"] or {}
    kind_of_scaling = scaling.get("rope_type", scaling.get("type", "default"))
    if kind_of_scaling == "llama3":
        divisors = llama3_divisors(s)
        entries.append(("rope_freqs.weight", divisors.shape, gguf_file.F32, lambda: divisors))
    elif kind_of_scaling == "linear":
        metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float(scaling["factor"])}
    elif kind_of_scaling != "default":
        raise SystemExit(f"rope_scaling {kind_of_scaling} cannot be exported")
    gguf_file.write(path, metadata, entries)


def random_model(args):
    s = dict(SHAPES[args.shape], eps=1e-5)
    tensors = tensors_of(s)
    out = pathlib.Path(args.out)
    directory = out / "hf"
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = sentencepiece_model(made_up_pieces(s["vocab"]))
    (directory / "config.json").write_text(json.dumps(config_of_shape(s, args.dtype), indent=1) + "\n")
    (directory / "tokenizer.model").write_bytes(tokenizer)

    def produce(name, shape):
        return draw(name, shape, args.seed)

    write_safetensors(directory / "model.safetensors", tensors, args.dtype, produce)
    write_gguf(out / f"model-{args.dtype}.gguf", s, tokenizer_metadata(tokenizer), tensors, args.dtype, produce)


def export(args):
    directory = pathlib.Path(args.directory)
    s = shape_of_config(json.loads((directory / "config.json").read_text()))
    raw = np.memmap(directory / "model.safetensors", np.uint8, "r")
    (size,) = struct.unpack("<Q", raw[:8].tobytes())
    header = json.loads(raw[8 : 8 + size].tobytes())

    def produce(name, shape):
        begin, end = header[name]["data_offsets"]
        data = raw[8 + size + begin : 8 + size + end].tobytes()
        kind = header[name]["dtype"]
        if kind == "BF16":
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[kind]).astype(np.float32)
        return values.reshape(shape)

    metadata = tokenizer_metadata((directory / "tokenizer.model").read_bytes())
    config = directory / "tokenizer_config.json"
    template = json.loads(config.read_text()).get("chat_template") if config.exists() else None
    if isinstance(template, str):
        metadata["tokenizer.chat_template"] = template
    write_gguf(args.out, s, metadata, tensors_of(s), args.dtype, produce)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    random = commands.add_parser("random", help="random weights in both forms")
    random.add_argument("shape", choices=SHAPES)
    random.add_argument("out", help="directory")
    random.add_argument("--seed", type=int, default=1)
    random.set_defaults(run=random_model)
    exporting = commands.add_parser("export", help="a Hugging Face directory as a GGUF file")
    exporting.add_argument("directory")
    exporting.add_argument("out", help="GGUF file")
    exporting.set_defaults(run=export)
    for command in (random, exporting):
        command.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
