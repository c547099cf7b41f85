"""atp calibrate on the default model: the file it writes, what a server makes of it, and what is refused."""

import json
import os
import tempfile
import unittest

from atp_binary import KV_HEADS, LAYERS, MODEL, atp

IDS = os.path.join(MODEL, "eval_ids.npy")
SCHEDULE = ("--segment", 64, "--window", 64)


class Calibrate(unittest.TestCase):
    def test_writes_budgets_with_the_wanted_mean(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "b.json")
            args = ("--model", MODEL, "--ids", IDS, *SCHEDULE, "--context", 200, "--limit", 1, "--ratio", 0.5, "--out", path)
            done = atp("calibrate", *args)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn(path, done.stdout)
            runs = LAYERS * KV_HEADS + 1  # each head alone, and exact
            self.assertIn(f"calibrating {runs} of {runs} runs", done.stderr)
            with open(path, encoding="utf-8") as file:
                budgets = json.load(file)
            self.assertEqual(set(budgets), {"ratio", "sensitivity"})
            for table in budgets.values():
                self.assertEqual([len(row) for row in table], [KV_HEADS] * LAYERS)
            ratios = [r for row in budgets["ratio"] for r in row]
            self.assertAlmostEqual(sum(ratios) / len(ratios), 0.5, delta=1e-9)
            for r in ratios:
                self.assertEqual(r * 64 % 16, 0)  # whole blocks
            # The most sensitive head has the most entries.
            pairs = sorted(zip([s for row in budgets["sensitivity"] for s in row], ratios))
            self.assertEqual(pairs[-1][1], max(ratios))
            self.assertLess(pairs[0][1], pairs[-1][1])
            # The same again, and eval takes it.
            with open(path, encoding="utf-8") as file:
                first = file.read()
            atp("calibrate", *args)
            with open(path, encoding="utf-8") as file:
                self.assertEqual(file.read(), first)
            done = atp("eval", "--model", MODEL, "--ids", IDS, *SCHEDULE, "--context", 200, "--limit", 1, "--budgets", path,
                       "--json")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(json.loads(done.stdout)["rows"][0]["ratio"], 0.5)

    def test_bytes_are_spent_on_entries_and_bits(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "b.json")
            args = ("--model", MODEL, "--ids", IDS, "--segment", 64, "--window", 0, "--context", 96, "--limit", 1)
            done = atp("calibrate", *args, "--bytes", 0.2, "--out", path)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("of the bytes of bf16", done.stdout)
            with open(path, encoding="utf-8") as file:
                budgets = json.load(file)
            self.assertEqual(set(budgets), {"ratio", "bits"} | {"sensitivity" + s for s in ("", "_half", "_quarter", "_eighth", "_none", "_4_bits")})
            self.assertLessEqual({b for row in budgets["bits"] for b in row}, {4, 8})
            done = atp("eval", *args, "--budgets", path, "--json")
            row, = json.loads(done.stdout)["rows"]
            self.assertLessEqual(row["bf16_bytes_ratio"], 0.2)
            self.assertGreater(row["bf16_bytes_ratio"], 0.15)
            # The file's curves serve other budgets, too: more bytes are better.
            done = atp("eval", *args, "--budgets", path, "--bytes", "0.2,0.5", "--json")
            same, more = json.loads(done.stdout)["rows"]
            self.assertEqual(same["kl"], row["kl"])
            self.assertLess(more["kl"], row["kl"])

    def test_text_with_repeated_spans(self):
        with tempfile.TemporaryDirectory() as folder:
            text, path = os.path.join(folder, "t.txt"), os.path.join(folder, "b.json")
            with open(text, "w", encoding="utf-8") as file:
                file.write(" ".join(f"The {i}th man went down to the sea." for i in range(60)))
            done = atp("calibrate", "--model", MODEL, "--text", text, "--segment", 32, "--window", 0, "--context", 80, "--limit", 2,
                       "--ratio", 0.75, "--out", path)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertTrue(os.path.exists(path))
            # As the server's start line says it: sequences are long enough for its segment and window.
            with open(text, "w", encoding="utf-8") as file:
                file.write(" ".join(f"The {i}th man went down to the sea." for i in range(120)))
            done = atp("calibrate", "--model", MODEL, "--text", text, "--ratio", 0.75, "--out", path)
            self.assertEqual(done.returncode, 0, done.stderr)

    def test_refusals(self):
        def says(code, text, *args):
            done = atp("calibrate", "--model", MODEL, *args)
            self.assertEqual(done.returncode, code, done.stderr)
            self.assertIn(text, done.stderr)
        says(2, "--text FILE or --ids FILE.npy", "--ratio", 0.5)
        says(2, "--ratio 1", "--ids", IDS, "--ratio", 1)
        says(2, "--ratio R or --bytes B", "--ids", IDS)
        says(2, "--ratio R or --bytes B", "--ids", IDS, "--ratio", 0.5, "--bytes", 0.5)
        says(2, "--bytes 2", "--ids", IDS, "--bytes", 2)
        says(1, "raise atp.segment_tokens", "--ids", IDS, "--bytes", 0.01, "--segment", 64, "--window", 0, "--context", 80, "--limit", 1, "--out", "/nonexistent")
        says(1, "never compressed", "--ids", IDS, "--ratio", 0.5, "--out", "/nonexistent/b.json")  # 512 = segment + window
        says(1, "never compressed", "--ids", IDS, "--ratio", 0.5, "--segment", 16, "--window", 0, "--set", "atp.sink_tokens=16")
        says(1, "after position 100000", "--ids", IDS, "--ratio", 0.5, "--segment", 64, "--window", 0, "--from", 100000)
        says(2, "--out: is empty", "--ids", IDS, "--ratio", 0.5, "--out", "")
        says(1, "/nonexistent/b.json", "--ids", IDS, "--ratio", 0.5, "--segment", 64, "--window", 0, "--context", 80, "--limit", 1,
             "--out", "/nonexistent/b.json")


if __name__ == "__main__":
    unittest.main(verbosity=2)
