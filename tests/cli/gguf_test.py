#!/usr/bin/env python3
"""GGUF files and --weight-dtype through the binary: the same answers and numbers as from the Hugging Face form."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

from atp_binary import MODEL, ROOT, atp

SCRIPT = pathlib.Path(ROOT) / "tests" / "bench" / "random_model.py"
PROMPT = "Once upon a time,  there was\na café — and 12 dogs."


def script(*args):
    subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], check=True, timeout=300)


def answer(model, *flags):
    result = atp("generate", "--model", model, "--prompt", PROMPT, "--max-tokens", "24", "--temperature", "0",
                 "--ignore-eos", "--repetition-penalty", "1", *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


def cross_entropy(model, *flags):
    result = atp("eval", "--model", model, "--ids", MODEL + "/eval_ids.npy", "--from", 1,
                 "--json", *flags)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["rows"][0]["cross_entropy"]


class GgufTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.dir = pathlib.Path(cls.temporary.name)

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def test_random_model_in_both_forms(self):
        script("random", "tiny", self.dir / "tiny", "--dtype", "f32")
        from_hf = answer(self.dir / "tiny" / "hf")
        self.assertEqual(answer(self.dir / "tiny" / "model-f32.gguf"), from_hf)
        for dtype in ("q8", "q4"):
            out = self.dir / f"tiny-{dtype}.gguf"
            result = atp("quantize", self.dir / "tiny" / "model-f32.gguf", out, "--weight-dtype", dtype)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertLess(out.stat().st_size, 0.3 * (self.dir / "tiny" / "model-f32.gguf").stat().st_size)
            self.assertEqual(answer(out), answer(self.dir / "tiny" / "hf", "--weight-dtype", dtype))

    def test_default_model_exported(self):
        path = self.dir / "default.gguf"
        script("export", MODEL, path)
        self.assertEqual(answer(path), answer(MODEL))
        self.assertEqual(cross_entropy(path), cross_entropy(MODEL))

    def test_quantised_weights_keep_the_quality(self):
        exact = cross_entropy(MODEL)
        self.assertLess(abs(cross_entropy(MODEL, "--weight-dtype", "q8") - exact), 0.01)
        self.assertLess(cross_entropy(MODEL, "--weight-dtype", "q4") - exact, 0.1)
        out = self.dir / "directory-q8"
        result = atp("quantize", MODEL, out, "--weight-dtype", "q8")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(sorted(os.listdir(out)), ["atp_budgets.json", "config.json", "generation_config.json", "model.gguf", "tokenizer.model", "tokenizer_config.json"])
        self.assertEqual(cross_entropy(out), cross_entropy(MODEL, "--weight-dtype", "q8"))
        self.assertEqual(answer(out), answer(MODEL, "--weight-dtype", "q8"))

    def test_bad_arguments(self):
        self.assertEqual(atp("quantize", MODEL, self.dir / "x", "--weight-dtype", "q3").returncode, 2)
        self.assertEqual(atp("quantize", MODEL).returncode, 2)
        result = atp("quantize", MODEL, self.dir, "--weight-dtype", "q8")
        self.assertEqual(result.returncode, 1)
        self.assertIn("is there already", result.stderr)
        result = atp("generate", "--model", MODEL, "--weight-dtype", "q5", "--prompt", "x")
        self.assertEqual(result.returncode, 2)
        self.assertIn("--weight-dtype", result.stderr)
        broken = self.dir / "broken.gguf"
        broken.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 16)
        result = atp("generate", "--model", broken, "--prompt", "x")
        self.assertEqual(result.returncode, 1)
        self.assertEqual(result.stderr.count("\n"), 1)
        self.assertIn(f"{broken}: expected at most", result.stderr)


if __name__ == "__main__":
    unittest.main()
