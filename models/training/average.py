#!/usr/bin/env python3
"""Averages the weights of models that were trained on from one another, which is often better than each of them.

  average.py --model A --share 0.5 --model B --share 0.3 --model C --share 0.2 [--sharpen LAYER,KV_HEAD,FACTOR] --out DIR

All files but the weights are the first one's. Model soups, Wortsman et al. 2022. --sharpen: the query heads of a kv head
attend with logits that are so many times as large, as a head that looks things up may want more than its training
made it. Needs: torch, safetensors.
"""
import argparse
import json
import pathlib
import shutil

from safetensors.torch import load_file, save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=pathlib.Path, action="append", help="in Hugging Face layout")
    parser.add_argument("--share", required=True, type=float, action="append", help="one for each model; they make 1")
    parser.add_argument("--sharpen", help="LAYER,KV_HEAD,FACTOR")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    args = parser.parse_args()
    if len(args.model) != len(args.share) or abs(sum(args.share) - 1) > 1e-6:
        parser.error("give one --share for each --model; together they make 1")
    models = [load_file(str(model / "model.safetensors")) for model in args.model]
    if any({k: t.shape for k, t in model.items()} != {k: t.shape for k, t in models[0].items()} for model in models):
        parser.error("the models have other tensors")
    shutil.copytree(args.model[0], args.out, dirs_exist_ok=True)
    average = {name: sum(share * model[name].float() for share, model in zip(args.share, models))
               for name in models[0]}
    if args.sharpen:
        layer, kv_head, factor = args.sharpen.split(",")
        config = json.loads((args.out / "config.json").read_text())
        rows = config["head_dim"] * config["num_attention_heads"] // config["num_key_value_heads"]
        first = int(kv_head) * rows
        average[f"model.layers.{layer}.self_attn.q_proj.weight"][first:first + rows] *= float(factor)
    average = {name: tensor.to(models[0][name].dtype) for name, tensor in average.items()}
    save_file(average, str(args.out / "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
