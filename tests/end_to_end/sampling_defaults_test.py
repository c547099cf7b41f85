"""What a request does not say of sampling is as the model's generation_config.json has it, over REST and gRPC and in
`atp generate`, unless the operator has it ignored."""

import json
import os
import subprocess
import sys
import tempfile
import unittest

from http_client import call
from server_fixture import Server, binary, build_dir, source_dir

sys.path.insert(0, os.path.join(source_dir(), "client", "python"))
sys.path.insert(0, os.path.join(build_dir(), "python"))

from atp_client import Client

PROMPT = "It was a dark and stormy night, and"
ANSWER = {"max_tokens": 24, "ignore_eos": True}


class SamplingDefaults(unittest.TestCase):
    def setUp(self):
        self.model = tempfile.TemporaryDirectory(prefix="atp-sampling-")
        default = os.path.join(source_dir(), "models", "default")
        for name in os.listdir(default):
            os.symlink(os.path.join(default, name), os.path.join(self.model.name, name))
        self.write({"do_sample": True, "temperature": 0})

    def tearDown(self):
        self.model.cleanup()

    def write(self, config):
        path = os.path.join(self.model.name, "generation_config.json")
        if os.path.lexists(path):
            os.remove(path)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(config, file)

    def rest(self, server, **parameters):
        return call(server, "/v1/completions", {"prompt": PROMPT, **ANSWER, **parameters})["choices"][0]["text"]

    def test_the_models(self):
        with Server(model_dir=self.model.name) as server, Client(server.grpc_target) as client:
            self.assertIn("temperature=0 ", server.log())
            greedy = self.rest(server, temperature=0)
            for seed in range(3):
                self.assertEqual(self.rest(server, seed=seed), greedy)
                self.assertEqual(client.generate(PROMPT, seed=seed, **ANSWER).text, greedy)
            chats = {call(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "seed": seed,
                                                           **ANSWER})["choices"][0]["message"]["content"]
                     for seed in range(3)}
            self.assertEqual(len(chats), 1)
            # What the request says wins.
            hot = [self.rest(server, seed=seed, temperature=1) for seed in range(3)]
            self.assertEqual(len(set(hot)), 3)
            self.assertEqual(client.generate(PROMPT, seed=0, temperature=1, **ANSWER).text, hot[0])
            server.assert_idle()
        for seed in (0, 1):
            said = subprocess.run([binary(), "generate", "--model", self.model.name, "--prompt", PROMPT, "--max-tokens",
                                   "24", "--ignore-eos", "--seed", str(seed)], capture_output=True, text=True, check=True)
            self.assertEqual(said.stdout, greedy + "\n")

    def test_ignored(self):
        with Server(model_dir=self.model.name, settings=["model.generation_config=ignore"]) as server:
            self.assertIn("temperature=1 ", server.log())
            self.assertEqual(len({self.rest(server, seed=seed) for seed in range(3)}), 3)

    def test_a_mistake_is_the_files(self):
        self.write({"temperature": -1})
        said = subprocess.run([binary(), "serve", "--model", self.model.name], capture_output=True, text=True)
        self.assertEqual(said.returncode, 1)
        self.assertIn("generation_config.json: temperature is -1; it must be between 0 and 100", said.stderr)
        self.assertIn("model.generation_config=ignore", said.stderr)
        with Server(model_dir=self.model.name, settings=["model.generation_config=ignore"]) as server:
            self.assertEqual(len(self.rest(server, seed=1)) > 0, True)


if __name__ == "__main__":
    unittest.main()
