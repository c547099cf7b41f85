"""Recall through a compressed cache, on a small model that does nothing else (train_recall.py made it).

The model reads 64 keys with their values and is then asked for 32 of them, when all 128 tokens are compressed. Exact, it knows
them; with calibrated budgets it still does; when the newest entries are kept instead, or all heads are compressed alike, it
does not. Only a cache that keeps the keys of the heads that look things up can pass.
"""

import json
import os
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "cli"))
from atp_binary import ROOT, atp  # noqa: E402

MODEL = os.path.join(ROOT, "tests", "recall", "model")
SCHEDULE = ("--segment", 128, "--window", 0, "--from", 128)


def table(*args):
    done = atp("eval", "--model", MODEL, "--ids", os.path.join(MODEL, "eval_ids.npy"), "--recall-tokens", 1, *SCHEDULE, *args, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return answer["exact"][0], answer["rows"]


class Recall(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        cls.budgets = {}
        for name, size in (("entries", ("--ratio", 0.5)), ("bytes", ("--bytes", 0.22))):
            cls.budgets[name] = os.path.join(cls.folder.name, name + ".json")
            done = atp("calibrate", "--model", MODEL, "--ids", os.path.join(MODEL, "calibration_ids.npy"), *SCHEDULE, *size, "--out",
                       cls.budgets[name])
            assert done.returncode == 0, done.stderr

    def test_all_pairs_are_known_exact_at_every_distance(self):
        exact, _ = table()
        self.assertGreaterEqual(exact["recall"], 0.99)
        self.assertGreaterEqual(exact["recall_tokens"], 16 * 32)
        self.assertGreaterEqual(len(exact["recall_by_distance"]), 4)

    def test_half_of_the_entries_where_they_are_needed(self):
        exact, (ours, *others) = table("--budgets", self.budgets["entries"])
        self.assertLessEqual(ours["ratio"], 0.5)
        self.assertGreaterEqual(ours["recall"], exact["recall"] - 0.04)
        _, (uniform, recent, *others) = table("--ratio", 0.5, "--baseline", "none,recent,attention,unfitted")
        self.assertLess(recent["recall"], 0.6)  # it has forgotten the first half
        for row in (uniform, *others):
            self.assertLess(row["recall"], ours["recall"] - 0.03, row["method"])

    def test_few_bytes(self):
        exact, (ours,) = table("--budgets", self.budgets["bytes"])
        self.assertLessEqual(ours["bf16_bytes_ratio"], 0.22)
        self.assertGreaterEqual(ours["recall"], exact["recall"] - 0.025)
        _, others = table("--ratio", 0.25, "--baseline", "none,recent,attention,unfitted")
        for row in others:  # all heads alike, with more bytes
            self.assertGreater(row["bf16_bytes_ratio"], ours["bf16_bytes_ratio"])
            self.assertLess(row["recall"], 0.65, row["method"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
