#!/usr/bin/env python3
"""Averages the weights of models that were trained on from one another, which is often better than each of them.

  average.py --model A --share 0.5 --model B --share 0.3 --model C --share 0.2 --out DIR

All files but the weights are the first one's. Model soups, Wortsman et al. 2022. Needs: torch, safetensors.
"""
import argparse
import pathlib
import shutil

from safetensors.torch import load_file, save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=pathlib.Path, action="append", help="in Hugging Face layout")
    parser.add_argument("--share", required=True, type=float, action="append", help="one for each model; they make 1")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    args = parser.parse_args()
    if len(args.model) != len(args.share) or abs(sum(args.share) - 1) > 1e-6:
        parser.error("give one --share for each --model; together they make 1")
    models = [load_file(str(model / "model.safetensors")) for model in args.model]
    if any({k: t.shape for k, t in model.items()} != {k: t.shape for k, t in models[0].items()} for model in models):
        parser.error("the models have other tensors")
    shutil.copytree(args.model[0], args.out, dirs_exist_ok=True)
    average = {name: sum(share * model[name].float() for share, model in zip(args.share, models)).to(first.dtype)
               for name, first in models[0].items()}
    save_file(average, str(args.out / "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
