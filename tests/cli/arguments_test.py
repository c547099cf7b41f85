"""Help says every flag with unit and default; what is wrong with arguments is one line and exit code 2."""

import os
import re
import tempfile
import unittest

from atp_binary import MODEL, ROOT, atp

COMMANDS = ("serve", "generate", "eval", "bench")


class Help(unittest.TestCase):
    def test_top_level_lists_the_commands(self):
        done = atp("--help")
        self.assertEqual(done.returncode, 0)
        for command in COMMANDS:
            self.assertRegex(done.stdout, rf"(?m)^  {command} +\S")
        self.assertEqual(done.stderr, "")

    def test_every_flag_states_its_default(self):
        for command in COMMANDS:
            done = atp(command, "--help")
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            blocks = re.split(r"(?m)^  (?=-)", done.stdout.split("Options:\n", 1)[1])
            self.assertGreater(len(blocks), 8)
            for block in blocks[1:]:
                if not block.startswith(("-h", "--set", "--text", "--ids")):
                    self.assertIn("(default: ", block, command)

    def test_defaults_are_those_of_the_configuration(self):
        text = atp("serve", "--help").stdout
        for default in ("default: 8000", "default: 8001", "default: 8002", "default: 127.0.0.1", "default: models/default"):
            self.assertIn(default, text)
        self.assertIn("drain_timeout_ms", text)

    def test_version(self):
        done = atp("--version")
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stdout, r"^atp \d+\.\d+\.\d+\n$")


class BadArguments(unittest.TestCase):
    def check(self, *args, says):
        done = atp(*args)
        self.assertEqual(done.returncode, 2, f"{args}: {done.stderr}")
        self.assertEqual(done.stdout, "")
        self.assertRegex(done.stderr, r"^atp: [^\n]+\n$", args)
        self.assertIn(says, done.stderr, args)

    def test_commands(self):
        self.check(says="serve, generate, eval, calibrate, bench or quantize")
        self.check("sreve", says="sreve")
        self.check("serve", "--bogus", says="--bogus")
        self.check("serve", "extra", says="extra")
        self.check("bench", says="what")
        self.check("bench", "everything", says="prefill")

    def test_values(self):
        self.check("serve", "--http-port", "70000", says="--http-port: 70000 is not an integer in [0, 65535]")
        self.check("serve", "--http-port", "x", says="--http-port: x")
        self.check("serve", "--device", "tpu", says="--device: tpu is not cpu | cuda | reference")
        self.check("serve", "--cpu-isa", "mmx", says="scalar")
        self.check("serve", "--threads", "-1", says="--threads: -1")
        self.check("serve", "--http-port", "8001", says="server.grpc_port")
        self.check("generate", "--temperature", "-1", says="--temperature")
        self.check("generate", "--max-tokens", "0", says="--max-tokens")
        self.check("eval", says="--text")
        self.check("eval", "--text", "a", "--ids", "b", says="either")
        self.check("eval", "--ids", "x.npy", "--ratio", "1,1.5", says="--ratio 1.5")
        self.check("eval", "--ids", "x.npy", "--ratio", "0.5", "--segment", "0", says="--segment 0")
        self.check("eval", "--ids", "x.npy", "--bits", "16,5", says="--bits 5")
        self.check("eval", "--ids", "x.npy", "--cap", "-5", says="--cap -5")
        self.check("bench", "decode", "--ratio", "0.5", says="--ratio")
        self.check("bench", "prefill", "--ratio", "1.5", says="--ratio")
        self.check("bench", "serve", "--cap", "64", says="give --ratio too")
        self.check("bench", "prefill", "--batch", "0", says="--batch")

    def test_settings(self):
        self.check("serve", "--set", "scheduler.max_waiting_request=1", says="scheduler.max_waiting_requests")
        self.check("serve", "--set", "server.http_port", says="section.key=value")
        self.check("serve", "--set", "kv_cache.memory_bytes=lots", says="4GiB")
        self.check("serve", "--config", "/nonexistent.yaml", says="/nonexistent.yaml")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "atp.yaml")
            with open(path, "w", encoding="utf-8") as file:
                file.write("server:\n  http_prot: 1\n")
            self.check("serve", "--config", path, says=f"{path}:2: server.http_prot")

    def test_later_sources_win(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "atp.yaml")
            with open(path, "w", encoding="utf-8") as file:
                file.write("model:\n  path: /from/file\n")
            self.assertIn("/from/file", atp("generate", "--config", path, "--prompt", "x").stderr)
            done = atp("generate", "--config", path, "--model", "/from/flag", "--prompt", "x")
            self.assertIn("/from/flag", done.stderr)
            done = atp("generate", "--model", "/first", "--model", "/second", "--prompt", "x")
            self.assertIn("/second", done.stderr)
            done = atp("generate", "--model", "/from/flag", "--set", "model.path=/from/set", "--prompt", "x")
            self.assertIn("/from/set", done.stderr)

    def test_what_is_not_built_in_is_a_failure(self):
        done = atp("generate", "--model", MODEL, "--device", "cuda", "--prompt", "x", "--max-tokens", "1")
        if done.returncode != 0:  # a build with CUDA on a machine with a GPU
            self.assertEqual(done.returncode, 1)
            self.assertRegex(done.stderr, r"^atp: [^\n]*cuda[^\n]*\n$")

    def test_example_configurations_are_accepted(self):
        done = atp("generate", "--config", os.path.join(ROOT, "config", "cpu.yaml"), "--prompt", "x", "--max-tokens", "1")
        self.assertEqual(done.returncode, 0, done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
