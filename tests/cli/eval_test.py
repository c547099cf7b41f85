"""atp eval on the default model: the number that an independent implementation has, and what is refused."""

import json
import os
import tempfile
import unittest

import numpy

from atp_binary import MODEL, atp

IDS = os.path.join(MODEL, "eval_ids.npy")


def evaluate(*args):
    done = atp("eval", "--model", MODEL, *args, "--json")
    assert done.returncode == 0, done.stderr
    row, = json.loads(done.stdout)["rows"]
    return row


class Eval(unittest.TestCase):
    def test_cross_entropy_of_held_out_text(self):
        row = evaluate("--ids", IDS, "--from", 256)
        self.assertAlmostEqual(row["cross_entropy"], 3.7612, delta=0.002)
        self.assertEqual(row["tokens"], 4 * 255)
        self.assertEqual(set(row), {"ratio", "segment", "window", "cap", "kv_bytes_ratio", "cross_entropy", "perplexity",
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
        self.assertEqual([len(line.split()) for line in done.stdout.splitlines()], [7, 7])

    def test_failures(self):
        def fails(*args, says):
            done = atp("eval", "--model", MODEL, *args)
            self.assertEqual(done.returncode, 1, done.stderr)
            self.assertRegex(done.stderr, r"^atp: [^\n]+\n$")
            self.assertIn(says, done.stderr)
        fails("--ids", "/nonexistent.npy", says="/nonexistent.npy")
        fails("--text", "/nonexistent.txt", says="/nonexistent.txt")
        fails("--ids", IDS, "--context", 513, says="512")
        fails("--ids", IDS, "--from", 511, says="nothing to judge")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "ids.npy")
            for array, says in ((numpy.zeros((2, 8)), "float"), (numpy.full((2, 8), 4096), "4096"),
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
