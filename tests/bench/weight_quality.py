#!/usr/bin/env python3
"""What quantised weights cost in cross-entropy: our formats beside llama.cpp's, the same matrices in each.

    weight_quality.py --atp build/cpu-release/atp --llama-bin LLAMA_CPP/build/bin --model models/default --text FILE

Matrices whose rows are no multiple of 256 (ffn_down of the first default model has 704) stay bf16 in every format, since no
K-quant can hold them. llama.cpp's formats come from its llama-quantize --pure, and all files are evaluated by atp.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import gguf_file

OURS = ["q8", "q4"]
THEIRS = ["Q8_0", "Q6_K", "Q5_K_S", "Q4_K_S", "Q4_0"]


def run(*command):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atp", required=True)
    parser.add_argument("--llama-bin", type=pathlib.Path, required=True)
    parser.add_argument("--model", required=True, help="Hugging Face directory with a SentencePiece tokenizer")
    parser.add_argument("--text", required=True)
    parser.add_argument("--bytes", type=int, default=60000, help="of the text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        (folder / "text").write_bytes(pathlib.Path(args.text).read_bytes()[: args.bytes])
        script = pathlib.Path(__file__).resolve().parent / "random_model.py"
        whole, part = folder / "bf16.gguf", folder / "part.gguf"
        run(sys.executable, script, "export", args.model, whole)
        entries, tensors = gguf_file.read(whole)
        kept = {name: t for name, t in tensors.items() if len(t[0]) == 2 and t[0][0] % 256 != 0}
        gguf_file.write_again(part, entries, {name: t for name, t in tensors.items() if name not in kept})
        rows = []
        for name in ["bf16", *OURS, *THEIRS]:
            path = folder / f"{name}.gguf"
            if name in OURS:
                run(args.atp, "quantize", part, path, "--weight-dtype", name)
            elif name in THEIRS:
                run(args.llama_bin / "llama-quantize", "--pure", part, path, name)
            quantised_entries, quantised = gguf_file.read(path)
            matrices = [t for t_name, t in quantised.items() if len(t[0]) == 2 and t_name not in kept]
            bits = 8 * sum(len(t[2]) for t in matrices) / sum(t[0][0] * t[0][1] for t in matrices)
            gguf_file.write_again(path, quantised_entries, quantised | kept)
            row = json.loads(run(args.atp, "eval", "--model", path, "--text", folder / "text", "--from", 128, "--context",
                                 512, "--json"))["rows"][0]
            rows.append({"format": name, "bits": bits, **{k: row[k] for k in ("cross_entropy", "perplexity", "tokens")}})
    print(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
