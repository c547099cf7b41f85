#!/usr/bin/env python3
"""Makes everything again that depends on the weights of models/default, after a new model was put there.

  regenerate.py --atp build/cpu-release/atp --train BOOKS.txt.xz --valid VALID.txt [--root COPY] [--only STEP,…]

In this order:
  budgets   models/default/atp_budgets.json, by `atp calibrate` on a sample of the training books
  golden    tests/golden/default by its own script, and the cross-entropy of eval_ids.npy that tests/cli/eval_test.py
            expects (both from numpy, not from the engine); tests/golden/principal_fit stays: any real heads will do
  tables    the tables behind `<!-- regenerate: NAME -->` in README.md and docs/principal_keys.md
  plot      docs/quality.svg (needs matplotlib)

Then run the tests, and read the sentences around the tables: they name numbers, too. --root: a copy of the repository to
write into, instead of this one. A quarter of an hour of two cores, most of it the budgets. Needs numpy.
"""
import argparse
import json
import lzma
import pathlib
import re
import subprocess
import sys
import tempfile

HELD_OUT, LONG = 32, 6  # sequences of 512 and of 2,048
STEPS = ("budgets", "golden", "tables", "plot")
PLACES, CHARACTERS = 6, 9000  # of the calibration, each a sequence
SCHEDULE = ["--from", "256", "--segment", "128", "--window", "128"]


class Regeneration:
    def __init__(self, args):
        self.args = args
        self.model = args.root / "models" / "default"
        self.budgets = self.model / "atp_budgets.json"
        self.ids = self.model / "eval_ids.npy"

    def atp(self, command, *args):
        line = [str(self.args.atp), command, "--model", str(self.model), *map(str, args)]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"failed: {' '.join(line)}")
        return done.stdout

    def eval(self, *args, ids=True, limit=HELD_OUT, schedule=tuple(SCHEDULE)):
        data = ["--ids", self.ids] if ids else ["--text", self.args.valid, "--limit", limit]
        return json.loads(self.atp("eval", *data, *schedule, *args, "--json"))["rows"]

    # --- the steps ---

    def make_budgets(self):
        opener = lzma.open if self.args.train.suffix == ".xz" else open
        with opener(self.args.train, "rt", encoding="utf-8", errors="replace") as file:
            text = file.read()
        parts = [text[len(text) * i // PLACES:][:CHARACTERS] for i in range(PLACES)]
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as sample:
            sample.write("<|endoftext|>".join(parts))
            sample.flush()
            print(self.atp("calibrate", "--text", sample.name, "--bytes", 0.125, "--limit", PLACES,
                           "--out", self.budgets))

    def make_golden(self):
        golden = self.args.root / "tests" / "golden"
        subprocess.run([sys.executable, golden / "generate_golden.py"], check=True)
        exact = subprocess.run([sys.executable, golden / "generate_golden.py", "--cross-entropy", self.model],
                               check=True, stdout=subprocess.PIPE, text=True).stdout
        (golden / "default" / "cross_entropy.txt").write_text(exact)

    def recall_table(self):
        recall = lambda *flags, **how: self.eval("--repeat-spans", "--recall-tokens", 4, *flags, ids=False, **how)
        spending = ("--ratio", 1, "--budgets", self.budgets, "--bytes", "0.25,0.125,0.0625")
        spent = recall(*spending)
        long = recall(*spending, limit=LONG,
                      schedule=("--context", 2048, "--segment", 256, "--window", 256, "--from", 512))
        alike = recall("--ratio", "0.25,0.125,0.0625", "--baseline", "none,attention,recent")
        table = [["", "exact", "1/4", "1/8", "1/16"], row("bytes, by budgets", spent, "recall")]
        for method, name in (("atp", "principal keys"), ("attention", "most attended"), ("recent", "newest and sinks")):
            table.append(row(f"entries, all heads alike: {name}", [spent[0]] + of(alike, method), "recall"))
        table.append(row("2,048 positions, segment and window 256: bytes, by budgets", long, "recall"))
        return table

    def bits_table(self):
        bits = self.eval("--ratio", "1,0.5,0.25,0.125", "--bits", "16,8,4")
        table = [["entries", "16 bits", "8 bits", "4 bits"]]
        for ratio, name in ((1, "1"), (0.5, "1/2"), (0.25, "1/4"), (0.125, "1/8")):
            table.append([name] + [f"{cell(r, 'kl')} ({r['kv_bytes_ratio']:.2g})" for r in bits if r["ratio"] == ratio])
        return table

    def windows_table(self):
        rows = self.eval("--segment", "64,128", "--window", "0,64,128", "--ratio", "0.25", schedule=("--from", 256))
        return [["segment", "window 0", "64", "128"]] + [
            row(str(segment), [r for r in rows if r["segment"] == segment], "kl") for segment in (64, 128)]

    def long_table(self):
        table = [["segment = window", "entries 1/2", "1/4", "1/8", "bytes 1/4", "1/8", "1/16"]]
        for segment in (256, 512):
            measure = lambda *flags: self.eval(
                *flags, "--budgets", self.budgets, ids=False, limit=LONG,
                schedule=("--context", 2048, "--segment", segment, "--window", segment, "--from", 2 * segment))
            entries = measure("--ratio", "0.5,0.25,0.125", "--baseline", "none,recent,attention,unfitted")
            spent = measure("--bytes", "0.25,0.125,0.0625")
            others = [min((r for r in entries if r["method"] != "atp" and r["ratio"] == ours["ratio"]), key=lambda r: r["kl"])
                      for ours in of(entries, "atp")]
            table.append(row(str(segment), of(entries, "atp") + of(spent, "atp"), "kl"))
            table.append(row(f"{segment}, the best other choice", others, "kl") + ["", "", ""])
        return table

    def make_tables(self):
        tables = {}
        uniform = self.eval("--ratio", "0.5,0.25,0.125", "--baseline", "none,recent,attention,unfitted")
        shared = self.eval("--ratio", "0.5,0.25,0.125", "--budgets", self.budgets, "--baseline", "none,recent,attention,unfitted")
        spent = self.eval("--budgets", self.budgets, "--bytes", "0.25,0.125,0.0625")
        exact = cell(self.eval("--ratio", "1")[0], "cross_entropy")
        spent = of(spent, "atp")
        ratios = ["1/2", "1/4", "1/8"]
        tables["entries"] = [["entries kept, mean of all heads"] + ratios,
                             row("KL, principal keys", of(shared, "atp"), "kl"),
                             row("KL, newest tokens and sinks", of(shared, "recent"), "kl"),
                             row("KL, most attended tokens (SnapKV style)", of(shared, "attention"), "kl"),
                             row("agreement, principal keys", of(shared, "atp"), "agreement"),
                             row(f"cross-entropy (exact {exact})", of(shared, "atp"), "cross_entropy")]
        tables["bytes"] = [["share of bf16 bytes", "1/4", "1/8", "1/16"], row("KL", spent, "kl"),
                           row("agreement", spent, "agreement"), row("cross-entropy", spent, "cross_entropy")]
        names = {"atp": "principal keys", "unfitted": "principal keys without fits (`unfitted`)",
                 "attention": "most attended entries (`attention`)", "recent": "newest entries and sinks (`recent`)"}
        tables["methods"] = [["method"] + ratios]
        tables["methods"] += [row(f"{name}, budgets", of(shared, method), "kl") for method, name in names.items()]
        tables["methods"] += [row(f"{name}, uniform", of(uniform, method), "kl") for method, name in names.items()]
        tables["methods"] += [row(f"cross-entropy of principal keys, budgets (exact {exact})", of(shared, "atp"), "cross_entropy"),
                              row("the same, uniform", of(uniform, "atp"), "cross_entropy")]
        held_out = {name: [r for r in self.eval(*flags, ids=False) if r["method"] == "atp"]
                    for name, flags in (("uniform", ["--ratio", "0.5,0.25,0.125"]),
                                        ("budgets", ["--ratio", "0.5,0.25,0.125", "--budgets", self.budgets]),
                                        ("spent", ["--budgets", self.budgets, "--bytes", "0.25,0.125,0.0625"]))}
        tables["held-out"] = [["method"] + ratios, row("budgets", held_out["budgets"], "kl"),
                              row("uniform", held_out["uniform"], "kl")]
        tables["spent"] = [["share of bf16 bytes: given, taken"] +
                           [f"{given}, {r['bf16_bytes_ratio']:.3f}" for given, r in zip(("1/4", "1/8", "1/16"), spent)],
                           row("`eval_ids.npy`", spent, "kl"), row(f"{HELD_OUT} held-out sequences", held_out["spent"], "kl"),
                           ["mean entries, mean bits"] + [f"{r['ratio']:.2f}, {r['bits']:.1f}" for r in spent]]
        tables |= {"recall": self.recall_table(), "bits": self.bits_table(), "windows": self.windows_table(),
                   "long": self.long_table()}
        for file in (self.args.root / "README.md", self.args.root / "docs" / "principal_keys.md"):
            file.write_text(with_tables(file.read_text(encoding="utf-8"), tables), encoding="utf-8")

    def make_plot(self):
        with tempfile.TemporaryDirectory() as folder:
            runs = [["--ratio", "0.5,0.25,0.125", "--bits", "16,4"],
                    ["--ratio", "0.5,0.25", "--budgets", self.budgets, "--baseline", "recent,attention,unfitted"],
                    ["--budgets", self.budgets, "--bytes", "0.5,0.25,0.1875,0.125,0.09,0.0625"]]
            files = []
            for i, flags in enumerate(runs):
                files.append(pathlib.Path(folder) / f"{i}.json")
                files[-1].write_text(json.dumps({"rows": self.eval(*flags)}))
            docs = self.args.root / "docs"
            subprocess.run([sys.executable, docs / "plot_quality.py", docs / "quality.svg", *files], check=True)


def of(rows, method):
    return [r for r in rows if r["method"] == method]


def cell(result, key):
    value = result[key]
    if key == "kl" and value == 0:
        return "0"
    if key == "kl":
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.3f}" if key in ("agreement", "recall") else f"{value:.4f}"


def row(name, results, key):
    return [name] + [cell(r, key) for r in results]


def with_tables(text, tables):
    """Replaces the table behind each mark; a mark without a table of that name is an error."""

    def table(found):
        head, *rest = tables[found.group(2)]
        lines = ["| " + " | ".join(line) + " |\n" for line in (head, *rest)]
        return found.group(1) + lines[0] + "|---" * len(head) + "|\n" + "".join(lines[1:])

    return re.sub(r"(<!-- regenerate: ([a-z-]+) -->\n)(?:\|.*\n)+", table, text)


def main():
    here = pathlib.Path(__file__).resolve().parent.parent.parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--atp", required=True, type=pathlib.Path)
    parser.add_argument("--train", required=True, type=pathlib.Path)
    parser.add_argument("--valid", required=True, type=pathlib.Path)
    parser.add_argument("--root", type=pathlib.Path, default=here)
    parser.add_argument("--only", default=",".join(STEPS), help=f"of {', '.join(STEPS)} (default: all)")
    args = parser.parse_args()
    args.atp, args.root = args.atp.resolve(), args.root.resolve()
    steps = args.only.split(",")
    if unknown := sorted(set(steps) - set(STEPS)):
        parser.error(f"--only: no step {unknown[0]!r}; there are {', '.join(STEPS)}")
    regeneration = Regeneration(args)
    for step in STEPS:
        if step in steps:
            print(f"== {step}", flush=True)
            getattr(regeneration, f"make_{step}")()


if __name__ == "__main__":
    main()
