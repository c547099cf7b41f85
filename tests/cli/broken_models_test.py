"""Model directories that are broken in every way a file can be: one line that names the file, exit code 1, no crash."""

import json
import os
import struct
import tempfile
import unittest

from atp_binary import MODEL, atp


def read(name):
    with open(os.path.join(MODEL, name), "rb") as file:
        return file.read()


def split_safetensors(raw):
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:8 + size]), raw[8 + size:]


def join_safetensors(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class BrokenModels(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.config = json.loads(read("config.json"))
        cls.weights = read("model.safetensors")
        cls.header, cls.data = split_safetensors(cls.weights)
        cls.tensor = next(name for name in cls.header if name.endswith("q_proj.weight"))

    def check(self, says, **files):
        """files: name with __ for . -> bytes, or None to leave it out."""
        replaced = {name.replace("__", "."): content for name, content in files.items()}
        with tempfile.TemporaryDirectory() as folder:
            for name in ("config.json", "model.safetensors", "tokenizer.model"):
                if name not in replaced:
                    os.symlink(os.path.join(MODEL, name), os.path.join(folder, name))
            for name, content in replaced.items():
                if content is not None:
                    with open(os.path.join(folder, name), "wb") as file:
                        file.write(content)
            done = atp("generate", "--model", folder, "--prompt", "x", "--max-tokens", "1")
        self.assertEqual(done.returncode, 1, f"{says}: {done.stdout} {done.stderr}")
        self.assertEqual(done.stdout, "")
        self.assertRegex(done.stderr, r"^atp: [^\n]+\n$", says)
        for part in says:
            self.assertIn(part, done.stderr)

    def with_config(self, **changes):
        return json.dumps(dict(self.config, **changes)).encode()

    def with_tensor(self, **changes):
        header = json.loads(json.dumps(self.header))
        header[self.tensor].update(changes)
        return join_safetensors(header, self.data)

    def test_an_intact_copy_works(self):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("config.json", "model.safetensors", "tokenizer.model"):
                os.symlink(os.path.join(MODEL, name), os.path.join(folder, name))
            self.assertEqual(atp("generate", "--model", folder, "--prompt", "x", "--max-tokens", "1").returncode, 0)

    def test_missing_files(self):
        self.check(["config.json"], config__json=None)
        self.check(["safetensors"], model__safetensors=None)
        self.check(["tokenizer"], tokenizer__model=None)

    def test_config(self):
        self.check(["config.json"], config__json=b"")
        self.check(["config.json"], config__json=b"not json")
        self.check(["config.json"], config__json=b"[1]")
        self.check(["config.json"], config__json=b'{"a":' * 100000)
        self.check(["GPT2LMHeadModel", "LlamaForCausalLM"], config__json=self.with_config(architectures=["GPT2LMHeadModel"]))
        self.check(["num_attention_heads"], config__json=self.with_config(num_attention_heads=0))
        self.check(["num_hidden_layers"], config__json=self.with_config(num_hidden_layers=10**12))
        self.check(["hidden_size"], config__json=self.with_config(hidden_size="big"))
        self.check(["vocab_size"], config__json=self.with_config(vocab_size=-1))

    def test_weights(self):
        self.check(["model.safetensors"], model__safetensors=b"")
        self.check(["model.safetensors"], model__safetensors=self.weights[:4])
        self.check(["model.safetensors"], model__safetensors=self.weights[:100])
        self.check(["model.safetensors"], model__safetensors=self.weights[:-1])
        self.check(["model.safetensors"], model__safetensors=struct.pack("<Q", 2**63) + self.weights[8:])
        self.check(["model.safetensors"], model__safetensors=struct.pack("<Q", 2) + b"[]" + self.data)
        self.check(["model.safetensors", self.tensor], model__safetensors=self.with_tensor(dtype="I8"))
        self.check(["model.safetensors", self.tensor], model__safetensors=self.with_tensor(shape=[7, 7]))
        self.check(["model.safetensors", self.tensor], model__safetensors=self.with_tensor(data_offsets=[0, 2**62]))
        self.check(["model.safetensors", self.tensor], model__safetensors=self.with_tensor(data_offsets=[4096, 0]))
        header = {name + ".old" if name == self.tensor else name: value for name, value in self.header.items()}
        self.check([self.tensor], model__safetensors=join_safetensors(header, self.data))

    def test_shapes_that_disagree_with_the_configuration(self):
        self.check(["model.safetensors"], config__json=self.with_config(intermediate_size=700))
        self.check(["model.safetensors"], config__json=self.with_config(num_key_value_heads=1))
        self.check(["model.safetensors"], config__json=self.with_config(num_hidden_layers=9))

    def test_tokenizer(self):
        self.check(["tokenizer.model"], tokenizer__model=b"")
        self.check(["tokenizer.model"], tokenizer__model=b"\xff" * 1000)
        self.check(["tokenizer.model"], tokenizer__model=read("tokenizer.model")[:50000])


if __name__ == "__main__":
    unittest.main(verbosity=2)
