#!/usr/bin/env python3
"""Judges models in Hugging Face layout side by side and draws the loss curve.

  report.py --text VALID.txt --model DIR [--model DIR …] [--log OUT/log.jsonl --picture loss.svg] [--json FILE]

For each model: cross-entropy per token and bits per byte of the text (windows of the model's own context, each token
predicted once), exact recall of a 16-token span by distance (the eight tokens before it are seen again; the share of
the 16 that the model then says itself up to the first wrong one, and the share of spans that are right as a whole), and a sample.
Needs: torch, numpy, safetensors, sentencepiece; matplotlib for the picture.
"""
import argparse
import json
import math
import pathlib

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F

from train import BOS, Llama, Shape, read_weights

CUE, SPAN = 8, 16
PROMPT = "It was a cold morning in the village, and the old doctor"


def load(directory):
    config = json.loads((directory / "config.json").read_text())
    shape = Shape(config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"],
                  config["num_key_value_heads"], config["intermediate_size"], config["max_position_embeddings"],
                  batch=1, dropout=0.0, head_dim=config["head_dim"], vocabulary=config["vocab_size"],
                  rope_theta=config["rope_theta"], rope_scaling=config.get("rope_scaling"))
    model = Llama(shape)
    model.load_state_dict(read_weights(directory))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    return model.eval(), tokenizer


def text_loss(model, ids, text_bytes, windows, device):
    """Cross-entropy over evenly spaced windows, and bits per byte at the text's own tokens per byte."""
    context = model.s.context
    starts = np.linspace(0, len(ids) - context - 1, windows).astype(int)
    total = 0.0
    for start in starts:
        row = torch.tensor([[BOS] + ids[start:start + context]], device=device)
        total += F.cross_entropy(model(row[:, :-1])[0].float(), row[0, 1:]).item()
    loss = total / windows
    return loss, loss / math.log(2) * len(ids) / text_bytes


def recall(model, ids, distance, trials, device):
    """Windows of held-out text in which CUE + SPAN tokens come again `distance` tokens later."""
    if distance + CUE + SPAN > model.s.context:
        return None
    rng = np.random.default_rng(distance)
    right, whole = 0, 0
    for _ in range(trials):
        start = int(rng.integers(0, len(ids) - distance - 64))
        row = [BOS] + ids[start:start + distance - 1]
        at = 1  # the span begins the window: its distance is exactly `distance`
        span = row[at:at + CUE + SPAN]
        row = row[:at + distance] + span
        # What it says while it is right is what it would say alone; after one wrong token follows another text.
        said = model(torch.tensor([row[:-1]], device=device))[0, -SPAN:].argmax(-1).tolist()
        correct = next((i for i in range(SPAN) if said[i] != span[CUE + i]), SPAN)
        right += correct
        whole += correct == SPAN
    return {"distance": distance, "tokens": right / (trials * SPAN), "spans": whole / trials}


def sample(model, tokenizer, prompt, tokens, device):
    generator = torch.Generator(device="cpu").manual_seed(1)
    ids = [BOS] + tokenizer.encode(prompt)
    for _ in range(tokens):
        logits = model(torch.tensor([ids[-model.s.context:]], device=device))[0, -1].float().cpu() / 0.8
        top = logits.topk(40)
        ids.append(int(top.indices[torch.multinomial(F.softmax(top.values, -1), 1, generator=generator)]))
    return tokenizer.decode(ids[1:])


def draw(log, picture):
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(6, 3.2))
    recall = axes.twinx()
    for name, style, on in (("train", "C0:", axes), ("valid", "C0-", axes), ("recall", "C1-", recall)):
        points = [(r["tokens"] / 1e6, r[name]) for r in rows if r[name] is not None and r["step"] > 0]
        on.plot(*zip(*points), style, label=name)
    axes.set(xlabel="million tokens", ylabel="cross-entropy per token")
    recall.set(ylabel="share of repeated tokens recalled", ylim=(0, 1))
    figure.legend(loc="center", bbox_to_anchor=(0.7, 0.5))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, type=pathlib.Path)
    parser.add_argument("--model", required=True, type=pathlib.Path, action="append")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--distances", default="64,256,480,1000,1500,2000")
    parser.add_argument("--log", type=pathlib.Path)
    parser.add_argument("--picture", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = args.text.read_text(encoding="utf-8")
    rows = []
    for directory in args.model:
        model, tokenizer = load(directory)
        model.to(device)
        ids = tokenizer.encode(text)
        loss, bits = text_loss(model, ids, len(text.encode()), args.windows, device)
        row = {"model": directory.name, "parameters": sum(p.numel() for p in model.parameters()), "loss": loss,
               "bits_per_byte": bits, "context": model.s.context,
               "recall": [recall(model, ids, int(d), args.trials, device) for d in args.distances.split(",")],
               "sample": sample(model, tokenizer, PROMPT, 120, device)}
        rows.append(row)
        print(json.dumps(row, indent=1), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if args.picture:
        draw(args.log, args.picture)


if __name__ == "__main__":
    main()
