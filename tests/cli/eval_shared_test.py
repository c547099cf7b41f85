"""atp eval on models and texts that lie beside the repository: numbers that independent implementations agree on."""

import json
import os
import unittest

from atp_binary import SHARED, atp, skip

STORIES = os.path.join(SHARED, "models", "stories260K")
RECALL = os.path.join(SHARED, "models", "recall")
TEXT = os.path.join(SHARED, "text", "tinystories_valid.txt")


def evaluate(*args):
    done = atp("eval", *args, "--json", timeout_s=550)
    assert done.returncode == 0, done.stderr
    row, = json.loads(done.stdout)["rows"]
    return row


class Shared(unittest.TestCase):
    def test_stories_model_on_its_own_samples(self):
        row = evaluate("--model", STORIES, "--ids", os.path.join(STORIES, "eval_ids.npy"), "--from", 256)
        self.assertAlmostEqual(row["cross_entropy"], 1.2922, delta=0.0005)

    def test_recall_model_has_no_tokenizer_and_needs_none(self):
        row = evaluate("--model", RECALL, "--ids", os.path.join(RECALL, "eval_ids.npy"), "--from", 132)
        self.assertAlmostEqual(row["accuracy"], 0.9485, delta=0.0005)
        self.assertAlmostEqual(row["cross_entropy"], 0.5055, delta=0.001)

    def test_stories_model_on_real_text(self):
        row = evaluate("--model", STORIES, "--text", TEXT)
        self.assertAlmostEqual(row["perplexity"], 4.24, delta=0.06)


if __name__ == "__main__":
    for path in (STORIES, RECALL, TEXT):
        if not os.path.exists(path):
            skip(f"{os.path.normpath(path)} does not exist")
    unittest.main(verbosity=2)
