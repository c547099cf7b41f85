#!/usr/bin/env python3
"""Draws docs/quality.svg from what `atp eval --json` printed: KL(exact || compressed) against the share of bf16 bytes.

  plot_quality.py OUT.svg EVAL.json...        needs python3-matplotlib
"""
import json
import sys

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "atp", "svg.fonttype": "none", "font.size": 10})
import matplotlib.pyplot as plt  # noqa: E402

STYLES = {
    "principal keys, bytes spent per head": ("#b2182b", "o-"),
    "principal keys, 4 bits": ("#ef8a62", "s-"),
    "principal keys, 16 bits": ("#2166ac", "o-"),
    "principal keys without fits": ("#999999", "^--"),
    "most attended (SnapKV style)": ("#777777", "v--"),
    "newest and sinks": ("#555555", "x--"),
}
BASELINES = {"unfitted": "principal keys without fits", "attention": "most attended (SnapKV style)", "recent": "newest and sinks"}


def name(row):
    if row["method"] != "atp":
        return BASELINES.get(row["method"])
    if row["per_head"]:
        return "principal keys, bytes spent per head"
    return {4: "principal keys, 4 bits", 16: "principal keys, 16 bits"}.get(row["bits"])


def main():
    out, *files = sys.argv[1:]
    lines = {}
    for path in files:
        with open(path, encoding="utf-8") as file:
            for row in json.load(file)["rows"]:
                if name(row) and row["kl"] > 0:
                    lines.setdefault(name(row), set()).add((row["bf16_bytes_ratio"], row["kl"]))
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    for label, (colour, style) in STYLES.items():
        if label in lines:
            axes.plot(*zip(*sorted(lines[label])), style, color=colour, label=label, markersize=5, linewidth=1.4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    shares = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
    axes.set_xticks(shares, [f"1/{round(1 / s)}" for s in shares])
    axes.set_xlabel("bytes of compressed context, share of bf16 (scales, log masses and padding counted)")
    axes.set_ylabel("KL(exact || compressed), nats per token")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
