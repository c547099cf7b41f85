#!/usr/bin/env python3
"""Writes a model of a known shape with random weights, as a Hugging Face directory: config.json and model.safetensors in bf16.

    tests/bench/bench_model.py --shape tinyllama-1.1b DIR [--context TOKENS]

For measuring speed, which depends on shapes only. There is no tokenizer: `atp bench` needs none. Weights are normal with
standard deviation 1/sqrt(inputs), so that activations and attention scores are of the size that trained models have; they
are drawn once per number of inputs and repeated. Standard library only.
"""
import argparse, array, json, math, os, random, struct

SHAPES = {  # layers, hidden, inner, heads, kv heads, head dim, vocabulary, positions, rope theta, tied embeddings
    "tinyllama-1.1b": (22, 2048, 5632, 32, 4, 64, 32000, 2048, 10000.0, False),
    "llama-3.2-1b": (16, 2048, 8192, 32, 8, 64, 128256, 131072, 500000.0, True),
    "tinyllama-layer": (1, 2048, 5632, 32, 4, 64, 4096, 65536, 10000.0, True),  # one of its 22
    "tiny": (4, 256, 704, 4, 2, 64, 4096, 65536, 500000.0, True),
}
DRAWN = 1 << 20


def to_bf16(floats):
    raw, out = array.array("f", floats).tobytes(), bytearray(2 * len(floats))
    out[0::2], out[1::2] = raw[2::4], raw[3::4]
    return bytes(out)


def tensors(shape):
    """Names and sizes in the order of the file: (rows, columns), or (size,) for a norm."""
    layers, hidden, inner, heads, kv_heads, dim, vocab, _, _, tied = shape
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(layers):
        for name, size in (("input_layernorm", (hidden,)), ("self_attn.q_proj", (heads * dim, hidden)),
                           ("self_attn.k_proj", (kv_heads * dim, hidden)), ("self_attn.v_proj", (kv_heads * dim, hidden)),
                           ("self_attn.o_proj", (hidden, heads * dim)), ("post_attention_layernorm", (hidden,)),
                           ("mlp.gate_proj", (inner, hidden)), ("mlp.up_proj", (inner, hidden)), ("mlp.down_proj", (hidden, inner))):
            yield f"model.layers.{layer}.{name}.weight", size
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocab, hidden)


def config_of(shape, context):
    layers, hidden, inner, heads, kv_heads, dim, vocab, positions, theta, tied = shape
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim,
            "vocab_size": vocab, "max_position_embeddings": context or positions, "rms_norm_eps": 1e-5, "rope_theta": theta,
            "hidden_act": "silu", "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}


def write_safetensors(path, shape):
    header, offset = {}, 0
    for name, size in tensors(shape):
        end = offset + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng, drawn, at = random.Random(1), {}, 0
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, size in tensors(shape):
            if len(size) == 1:
                file.write(to_bf16([1.0]) * size[0])
                continue
            inputs = size[1]
            if inputs not in drawn:
                drawn[inputs] = to_bf16([rng.gauss(0, inputs ** -0.5) for _ in range(DRAWN)])
            block, left = drawn[inputs], 2 * math.prod(size)
            at = (at + 2 * 99991) % len(block)  # no two matrices begin alike
            while left > 0:
                part = block[at:at + left]
                file.write(part)
                left, at = left - len(part), (at + len(part)) % len(block)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--context", type=int, default=0, help="positions, instead of the shape's own")
    parser.add_argument("directory")
    a = parser.parse_args()
    os.makedirs(a.directory, exist_ok=True)
    with open(os.path.join(a.directory, "config.json"), "w") as file:
        json.dump(config_of(SHAPES[a.shape], a.context), file, indent=1)
    write_safetensors(os.path.join(a.directory, "model.safetensors"), SHAPES[a.shape])


if __name__ == "__main__":
    main()
