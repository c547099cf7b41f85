"""atp eval on the default model: the number that an independent implementation has, and what is refused."""

import json
import os
import tempfile
import unittest

import numpy

from atp_binary import CONFIG, MODEL, POSITIONS, atp

IDS = os.path.join(MODEL, "eval_ids.npy")
BUDGETS = os.path.join(MODEL, "atp_budgets.json")  # one of its heads needs all of its keys


def evaluate(*args):
    done = atp("eval", "--model", MODEL, *args, "--json")
    assert done.returncode == 0, done.stderr
    row, = json.loads(done.stdout)["rows"]
    return row


SCHEDULE = ("--from", 256, "--segment", 128, "--window", 128)


def table(*args, ids=IDS):
    done = atp("eval", "--model", MODEL, "--ids", ids, *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rows"]


class Eval(unittest.TestCase):
    def test_cross_entropy_of_held_out_text(self):
        row = evaluate("--ids", IDS, "--from", 256)
        with open(os.path.join(os.path.dirname(__file__), "../golden/default/cross_entropy.txt"), encoding="utf-8") as file:
            self.assertAlmostEqual(row["cross_entropy"], float(file.read()), delta=0.002)
        self.assertEqual(row["tokens"], 4 * 255)
        self.assertEqual(set(row), {"method", "kv_dtype", "kv_held_ratio", "ratio", "segment", "window", "cap", "per_head", "bits", "kv_bytes_ratio", "bf16_bytes_ratio", "cross_entropy", "perplexity",
                                    "recall", "recall_tokens", "recall_by_distance",
                                    "kl", "agreement", "accuracy", "tokens"})

    def test_f32_cache_and_reference_backend_agree(self):
        exact = evaluate("--ids", IDS, "--limit", 1, "--context", 64, "--set", "kv_cache.dtype=f32")
        naive = evaluate("--ids", IDS, "--limit", 1, "--context", 64, "--set", "kv_cache.dtype=f32", "--device", "reference")
        self.assertEqual(exact["tokens"], 63)
        self.assertAlmostEqual(exact["cross_entropy"], naive["cross_entropy"], delta=1e-4)

    def test_all_integer_types_and_ragged_steps_agree(self):
        ids = numpy.load(IDS)
        with tempfile.TemporaryDirectory() as folder:
            results = set()
            for kind in ("int32", "int64", "uint16"):
                path = os.path.join(folder, kind + ".npy")
                numpy.save(path, numpy.tile(ids[:, :100], (6, 1)).astype(kind))  # more sequences than run side by side
                row = evaluate("--ids", path, "--from", 30)
                self.assertEqual(row["tokens"], 24 * 69)
                results.add(row["cross_entropy"])
            self.assertEqual(len(results), 1)
            alone = [evaluate("--ids", IDS, "--context", 100, "--from", 30, "--limit", n)["cross_entropy"] for n in (1, 4)]
            # Whatever else is in the batch: 24 sequences are the 4, six times.
            self.assertAlmostEqual(alone[1], results.pop(), delta=1e-9)

    def test_stories_are_judged_one_by_one(self):
        with tempfile.TemporaryDirectory() as folder:
            def text(name, content):
                path = os.path.join(folder, name)
                with open(path, "w", encoding="utf-8") as file:
                    file.write(content)
                return evaluate("--text", path)
            a, b = "The sun went down behind the hills.", "He said nothing to her."
            first, second = text("a", a + "<|endoftext|>"), text("b", b + "<|endoftext|>")
            both = text("c", f"{a}\n<|endoftext|>\n\n {b} \n<|endoftext|>\n")
            self.assertEqual(both["tokens"], first["tokens"] + second["tokens"])
            mean = (first["cross_entropy"] * first["tokens"] + second["cross_entropy"] * second["tokens"]) / both["tokens"]
            self.assertAlmostEqual(both["cross_entropy"], mean, delta=1e-9)
            # Without separators: windows, each with its BOS, that cover every token once.
            windows = evaluate("--text", text_file(folder, a * 50), "--context", 32)
            longer = evaluate("--text", text_file(folder, a * 50), "--context", 512)
            self.assertGreater(windows["cross_entropy"], longer["cross_entropy"])
            self.assertEqual(windows["tokens"], longer["tokens"])

    def test_a_table_for_people(self):
        done = atp("eval", "--model", MODEL, "--ids", IDS, "--limit", 1, "--context", 32)
        self.assertEqual(done.returncode, 0, done.stderr)
        lines = done.stdout.split("\n\n")[0].splitlines()
        self.assertEqual([len(line.split()) for line in lines], [15, 15])

    def test_recall_by_distance(self):
        # Twice the same 40 tokens: everything after the first two of the second time is recall over 40 tokens.
        ids = numpy.load(IDS)[:1, 100:140]
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "twice.npy")
            numpy.save(path, numpy.tile(ids, (1, 2)))
            row, = table("--recall-tokens", 3, ids=path)
            self.assertEqual([(b["distance"], b["tokens"]) for b in row["recall_by_distance"]], [(32, 37)])
            self.assertEqual(row["recall_tokens"], 37)
            self.assertAlmostEqual(row["recall"], row["recall_by_distance"][0]["accuracy"])
            done = atp("eval", "--model", MODEL, "--ids", path, "--recall-tokens", 3)
            self.assertIn("32..63", done.stdout)

    def test_recall_survives_compression(self):
        spans = ("--repeat-spans", "--recall-tokens", 4)
        exact, *spent = table(*spans, *SCHEDULE, "--budgets", BUDGETS, "--ratio", 1, "--bytes", "0.25,0.125")
        self.assertGreater(exact["recall"], 0.9)
        self.assertGreater(exact["recall_tokens"], 700)
        for row, lost in zip(spent, (0.01, 0.03)):
            self.assertGreater(row["recall"], exact["recall"] * (1 - lost))
        uniform, = table(*spans, *SCHEDULE, "--ratio", 0.25)
        self.assertLess(uniform["recall"], exact["recall"] * 0.97)

    def test_compressed_history_answers_alike(self):
        rows = table("--ratio", "1,0.5,0.25", *SCHEDULE, "--budgets", BUDGETS)
        for row, most in zip(rows, (0, 2e-4, 1e-3)):
            self.assertLessEqual(row["kl"], most)
            self.assertLessEqual(abs(row["cross_entropy"] / rows[0]["cross_entropy"] - 1), 1e-3)
        self.assertEqual([row["method"] for row in rows], ["exact", "atp", "atp"])
        for row, ratio in zip(rows[1:], (0.5, 0.25)):
            self.assertGreater(row["kl"], 0)
            self.assertLessEqual(ratio, row["kv_bytes_ratio"])
            self.assertLess(row["kv_bytes_ratio"], ratio * 1.05)
            # Two of four segments are compressed at the end; the third is kept both ways, and the queries are, too.
            self.assertLess(row["kv_held_ratio"], 0.5 + 1.5 * ratio / 2 + 0.1)

    def test_principal_keys_beat_other_choices(self):
        for ratio, kl, factor in ((0.5, 2e-4, 8), (0.25, 1e-3, 8), (0.125, 3e-3, 3)):
            ours, *others = table("--ratio", ratio, *SCHEDULE, "--budgets", BUDGETS, "--baseline", "none,recent,attention,unfitted")
            self.assertEqual([row["method"] for row in others], ["recent", "attention", "unfitted"])
            self.assertLess(ours["kl"], kl)
            for row in others:
                self.assertGreater(row["kl"], factor * ours["kl"], row)

    def test_budgets_per_head(self):
        uniform, = table("--ratio", 0.25, *SCHEDULE)
        shared, = table("--ratio", 0.25, *SCHEDULE, "--budgets", BUDGETS)
        own, = table(*SCHEDULE, "--budgets", BUDGETS)  # without --ratio: what the file has
        with open(BUDGETS, encoding="utf-8") as file:
            ratios = [ratio for layer in json.load(file)["ratio"] for ratio in layer]
        self.assertAlmostEqual(own["ratio"], sum(ratios) / len(ratios))
        self.assertTrue(own["per_head"])
        self.assertTrue(4 < own["bits"] < 8)
        self.assertEqual(shared["kv_bytes_ratio"], uniform["kv_bytes_ratio"])
        self.assertLess(shared["kl"], 0.02 * uniform["kl"])

    def test_bytes_are_spent_well(self):
        rows = table(*SCHEDULE, "--budgets", BUDGETS, "--bytes", "0.125,0.0625")
        # The plan's bound at 1/16, 1e-3, is not reached with this model (docs/principal_keys.md); eval_shared_test.py holds it with another.
        self.assertLess(rows[0]["kl"], 5e-4)
        self.assertLess(rows[1]["kl"], 4e-3)
        for row, share in zip(rows, (0.125, 0.0625)):
            self.assertLessEqual(row["bf16_bytes_ratio"], share)
            self.assertGreater(row["bf16_bytes_ratio"], 0.9 * share)

    def test_every_combination_is_a_row(self):
        rows = table("--ratio", "0.5,0.25", "--segment", "32,64", "--window", "0,32", "--cap", "0,48", "--kv-dtype", "f32,bf16",
                     "--limit", 1, "--context", 200, "--from", 100)
        keys = [(r["kv_dtype"], r["segment"], r["window"], r["cap"], r["ratio"]) for r in rows]
        self.assertEqual(len(set(keys)), 32)
        self.assertEqual(len(keys), 32)
        for row in rows:  # how small, says eval_shared_test.py: all heads alike do not suit this model
            self.assertGreater(row["kl"], 0)
        by_key = dict(zip(keys, rows))
        for key, row in by_key.items():  # three segments of 16 entries in 48: the cap is met, not passed, or it costs
            if key[3] == 0 and key[1] == 64 and key[4] == 0.25:
                self.assertEqual(by_key[key[:3] + (48,) + key[4:]]["kl"], row["kl"])
        capped = by_key[("f32", 32, 0, 48, 0.5)]
        self.assertLess(capped["kv_bytes_ratio"], by_key[("f32", 32, 0, 0, 0.5)]["kv_bytes_ratio"])

    def test_the_schedule_does_not_matter(self):
        one = table("--ratio", 0.25, *SCHEDULE, "--limit", 1)[0]["kl"]
        ids = numpy.load(IDS)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "many.npy")
            numpy.save(path, numpy.tile(ids[:1], (9, 1)))  # nine of the same, side by side
            self.assertAlmostEqual(table("--ratio", 0.25, *SCHEDULE, ids=path)[0]["kl"], one, delta=1e-12)

    def test_bad_arguments(self):
        def refused(*args, says):
            done = atp("eval", "--model", MODEL, *args)
            self.assertEqual(done.returncode, 2, done.stderr)
            self.assertIn(says, done.stderr)
        refused("--ids", IDS, "--ratio", "0.5,0", says="--ratio 0: expected more than 0 and at most 1")
        refused("--ids", IDS, "--ratio", "1.5", says="--ratio 1.5")
        refused("--ids", IDS, "--baseline", "best", says="none, recent, attention or unfitted")
        refused("--ids", IDS, "--kv-dtype", "int3", says="kv_cache.dtype: int3")
        refused("--ratio", "0.5", says="--text FILE or --ids FILE.npy")
        refused("--ids", IDS, "--bytes", "0.5", says="--budgets FILE")

    def test_failures(self):
        def fails(*args, says):
            done = atp("eval", "--model", MODEL, *args)
            self.assertEqual(done.returncode, 1, done.stderr)
            self.assertRegex(done.stderr, r"^atp: [^\n]+\n$")
            self.assertIn(says, done.stderr)
        fails("--ids", "/nonexistent.npy", says="/nonexistent.npy")
        fails("--text", "/nonexistent.txt", says="/nonexistent.txt")
        fails("--ids", IDS, "--context", POSITIONS + 1, says=str(POSITIONS))
        fails("--ids", IDS, "--from", 511, says="nothing to judge")
        fails("--ids", IDS, "--ratio", 0.5, "--segment", 100, says="atp.segment_tokens")
        fails("--ids", IDS, "--budgets", "/nonexistent.json", says="/nonexistent.json")
        vocabulary = CONFIG["vocab_size"]
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "ids.npy")
            for array, says in ((numpy.zeros((2, 8)), "float"), (numpy.full((2, 8), vocabulary), str(vocabulary)),
                                (numpy.asfortranarray(numpy.arange(16).reshape(2, 8)), "C order")):
                numpy.save(path, array)
                fails("--ids", path, says="dtype" if says == "float" else says)


def text_file(folder, content):
    path = os.path.join(folder, "windows.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.write(content)
    return path


if __name__ == "__main__":
    unittest.main(verbosity=2)
