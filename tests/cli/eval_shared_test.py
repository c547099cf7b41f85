"""atp eval on models and texts that lie beside the repository: numbers that independent implementations agree on."""

import json
import os
import tempfile
import unittest

from atp_binary import SHARED, atp, skip

STORIES = os.path.join(SHARED, "models", "stories260K")
BOOTSTRAP = os.path.join(SHARED, "models", "bootstrap")  # the first default model: none of its heads needs all of its keys
BOOTSTRAP_BUDGETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bootstrap_budgets.json")
RECALL = os.path.join(SHARED, "models", "recall")
TEXT = os.path.join(SHARED, "text", "tinystories_valid.txt")


def evaluate(*args):
    done = atp("eval", *args, "--json", timeout_s=550)
    assert done.returncode == 0, done.stderr
    row, = json.loads(done.stdout)["rows"]
    return row


def bootstrap(*args, schedule=("--from", 256, "--segment", 128, "--window", 128)):
    done = atp("eval", "--model", BOOTSTRAP, "--ids", os.path.join(BOOTSTRAP, "eval_ids.npy"), *schedule, *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rows"]


class Bootstrap(unittest.TestCase):
    """The plan's bounds, all heads alike, on held-out books."""

    def test_compressed_history_answers_alike(self):
        rows = bootstrap("--ratio", "1,0.5,0.25,0.125")
        for row, most in zip(rows, (0, 2e-4, 1e-3, 3e-3)):
            self.assertLessEqual(row["kl"], most)
            self.assertLessEqual(abs(row["cross_entropy"] / rows[0]["cross_entropy"] - 1), 1e-3)

    def test_principal_keys_beat_other_choices(self):
        for ratio, factor in ((0.5, 8), (0.25, 8), (0.125, 3)):
            ours, *others = bootstrap("--ratio", ratio, "--baseline", "none,recent,attention,unfitted")
            self.assertEqual([row["method"] for row in others], ["recent", "attention", "unfitted"])
            for row in others:
                self.assertGreater(row["kl"], factor * ours["kl"], row)

    def test_bytes_are_spent_well(self):
        rows = bootstrap("--budgets", BOOTSTRAP_BUDGETS, "--bytes", "0.125,0.0625")
        for row, share, most in zip(rows, (0.125, 0.0625), (5e-4, 1e-3)):
            self.assertLessEqual(row["bf16_bytes_ratio"], share)
            self.assertGreater(row["bf16_bytes_ratio"], 0.9 * share)
            self.assertLess(row["kl"], most)

    def test_every_combination_stays_close(self):
        rows = bootstrap("--ratio", "0.5,0.25", "--segment", "32,64", "--window", "0,32", "--cap", "0,48", "--kv-dtype", "f32,bf16",
                         "--limit", 1, "--context", 200, "--from", 100, schedule=())
        self.assertEqual(len(rows), 32)
        for row in rows:
            self.assertLess(row["kl"], 0.05)


class Shared(unittest.TestCase):
    def test_stories_model_on_its_own_samples(self):
        row = evaluate("--model", STORIES, "--ids", os.path.join(STORIES, "eval_ids.npy"), "--from", 256)
        self.assertAlmostEqual(row["cross_entropy"], 1.2922, delta=0.0005)

    def test_recall_model_has_no_tokenizer_and_needs_none(self):
        row = evaluate("--model", RECALL, "--ids", os.path.join(RECALL, "eval_ids.npy"), "--from", 132)
        self.assertAlmostEqual(row["accuracy"], 0.9485, delta=0.0005)
        self.assertAlmostEqual(row["cross_entropy"], 0.5055, delta=0.001)

    def test_stories_model_compressed(self):
        done = atp("eval", "--model", STORIES, "--ids", os.path.join(STORIES, "eval_ids.npy"), "--from", 256, "--segment", 128,
                   "--window", 128, "--ratio", "0.5,0.25,0.125", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        for row, most in zip(json.loads(done.stdout)["rows"], (1e-4, 5e-4, 2e-3)):
            self.assertLessEqual(row["kl"], most)

    def test_recall_survives_with_calibrated_budgets_only(self):
        schedule = ("--segment", 128, "--window", 0, "--from", 132)
        with tempfile.TemporaryDirectory() as folder:
            budgets = os.path.join(folder, "b.json")
            done = atp("calibrate", "--model", RECALL, "--ids", os.path.join(RECALL, "calibration_ids.npy"), *schedule, "--ratio", 0.5,
                       "--out", budgets)
            self.assertEqual(done.returncode, 0, done.stderr)
            ids = ("--model", RECALL, "--ids", os.path.join(RECALL, "eval_ids.npy"))
            self.assertGreaterEqual(evaluate(*ids, *schedule, "--budgets", budgets)["accuracy"], 0.945)
            self.assertLess(evaluate(*ids, *schedule, "--ratio", 0.5)["accuracy"], 0.7)

    def test_stories_model_on_real_text(self):
        row = evaluate("--model", STORIES, "--text", TEXT)
        self.assertAlmostEqual(row["perplexity"], 4.24, delta=0.06)


if __name__ == "__main__":
    for path in (STORIES, BOOTSTRAP, RECALL, TEXT):
        if not os.path.exists(path):
            skip(f"{os.path.normpath(path)} does not exist")
    unittest.main(verbosity=2)
