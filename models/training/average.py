#!/usr/bin/env python3
"""Averages the weights of a model and of one trained on from it, which is often better than both.

  average.py --model BEFORE --model AFTER --share 0.65 --out DIR

--share: how much of AFTER. Model soups, Wortsman et al. 2022. Needs: torch, safetensors.
"""
import argparse
import pathlib
import shutil

from safetensors.torch import load_file, save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=pathlib.Path, action="append", help="in Hugging Face layout; twice")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    args = parser.parse_args()
    if len(args.model) != 2:
        parser.error("give --model twice")
    before, after = (load_file(str(model / "model.safetensors")) for model in args.model)
    if {k: t.shape for k, t in before.items()} != {k: t.shape for k, t in after.items()}:
        parser.error("the models have other tensors")
    shutil.copytree(args.model[1], args.out, dirs_exist_ok=True)
    average = {name: before[name].float().lerp(after[name].float(), args.share).to(before[name].dtype) for name in before}
    save_file(average, str(args.out / "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
