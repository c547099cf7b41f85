"""atp generate and atp bench: answers on stdout, the same for the same seed; and the bar while a model loads."""

import json
import os
import pty
import subprocess
import unittest

from atp_binary import BINARY, BLOCK_BYTES, KV_HEADS, LAYERS, MODEL, POSITIONS, ROOT, atp


def generate(*args, stdin=""):
    done = atp("generate", "--model", MODEL, *args, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", done.stderr
    return done.stdout


class Generate(unittest.TestCase):
    def test_same_seed_same_answer(self):
        first = generate("--prompt", "The old man", "--max-tokens", 40, "--seed", 7)
        self.assertGreater(len(first), 20)
        self.assertEqual(first, generate("--prompt", "The old man", "--max-tokens", 40, "--seed", 7))
        self.assertEqual(first, generate("--prompt", "The old man", "--max-tokens", 40, "--seed", 7, "--threads", 1))
        others = {generate("--prompt", "The old man", "--max-tokens", 40, "--seed", seed) for seed in (8, 9, 10)}
        self.assertNotEqual(others, {first})

    def test_greedy_needs_no_seed(self):
        answers = {generate("--prompt", "Once upon", "--max-tokens", 20, "--temperature", 0) for _ in range(2)}
        self.assertEqual(len(answers), 1)

    def test_prompt_from_stdin(self):
        args = ("--max-tokens", 20, "--seed", 3)
        self.assertEqual(generate(*args, stdin="The old man\n"), generate("--prompt", "The old man", *args))

    def test_backends_agree(self):
        args = ("--prompt", "The old man", "--max-tokens", 12, "--temperature", 0)
        self.assertEqual(generate(*args), generate(*args, "--device", "reference"))

    def test_stop_and_chat(self):
        whole = generate("--prompt", "The old man", "--max-tokens", 40, "--seed", 7)
        stop = whole.split()[5]
        cut = generate("--prompt", "The old man", "--max-tokens", 40, "--seed", 7, "--stop", stop)
        self.assertEqual(cut.rstrip("\n"), whole[:whole.index(stop)])
        self.assertTrue(generate("--chat", "--prompt", "Hello", "--max-tokens", 8, "--seed", 1).endswith("\n"))

    def test_a_prompt_that_cannot_fit(self):
        done = atp("generate", "--model", MODEL, "--prompt", "word " * 2 * POSITIONS)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, rf"^atp: [^\n]*{POSITIONS}[^\n]*\n$")

    def test_loading_shows_a_bar_on_a_terminal_only(self):
        try:
            master, terminal = pty.openpty()
        except OSError as error:
            self.skipTest(f"no pseudo terminal on this machine: {error}")
        subprocess.run([BINARY, "generate", "--model", MODEL, "--prompt", "x", "--max-tokens", "1"], stderr=terminal,
                       stdout=subprocess.DEVNULL, check=True, timeout=60, cwd=ROOT)
        os.close(terminal)
        shown = b""
        try:
            while True:
                shown += os.read(master, 4096)
        except OSError:  # the other end is closed
            pass
        self.assertRegex(shown.decode(), r"loading \S+ \[[#.]+\] +\d+ %")
        self.assertTrue(shown.endswith(b"\r\x1b[K"), shown)


class Bench(unittest.TestCase):
    def test_rows(self):
        for what, tokens in (("prefill", 3 * 50), ("decode", 3 * 4), ("serve", 3 * 4)):
            done = atp("bench", what, "--model", MODEL, "--batch", 3, "--context", 50, "--tokens", 4, "--json")
            self.assertEqual(done.returncode, 0, done.stderr)
            row, = json.loads(done.stdout)["rows"]
            self.assertEqual((row["bench"], row["batch"], row["context"], row["tokens"]), (what, 3, 50, tokens))
            self.assertGreater(row["tokens_per_second"], 0)
            self.assertEqual(row["kv_bytes"], 3 * 4 * LAYERS * KV_HEADS * BLOCK_BYTES)  # 54 tokens are 4 blocks

    def test_compressed_history(self):
        def row(what, ratio):
            done = atp("bench", what, "--model", MODEL, "--context", 400, "--tokens", 4, "--ratio", ratio, "--json",
                       "--set", "atp.segment_tokens=64", "--set", "atp.window_tokens=64")
            self.assertEqual(done.returncode, 0, done.stderr)
            return json.loads(done.stdout)["rows"][0]
        for what, tokens in (("prefill", 400), ("serve", 4)):
            exact, compressed = row(what, 1), row(what, 0.25)
            self.assertEqual((compressed["tokens"], compressed["preemptions"]), (tokens, 0))
            self.assertEqual(exact["fit_share"], 0)
            self.assertTrue(0 < compressed["fit_share"] < 1, compressed)
            self.assertLess(compressed["kv_bytes_last"], 0.6 * exact["kv_bytes_last"])

    def test_more_than_the_model_has_positions_for(self):
        done = atp("bench", "decode", "--model", MODEL, "--context", POSITIONS, "--tokens", 1)
        self.assertEqual(done.returncode, 1)
        self.assertIn(str(POSITIONS), done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
