"""The examples of README.md do what it says: each fenced block after a line `<!-- test: run -->` is run as it stands,
with only the ports exchanged for those of a server that this test started, and has to succeed and to print something.

`<!-- test: run needs=openai -->` names a Python module without which the block is skipped (openai_client_test.py
installs that one into a venv, whose interpreter is taken when it is there)."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

from server_fixture import Server, binary, build_dir, source_dir, wait_until

BLOCK = re.compile(r"<!-- test: run(?: needs=([\w,]+))? -->\n+```(\w+)\n(.*?)```", re.DOTALL)
TIMEOUT_S = 120


def examples():
    with open(os.path.join(source_dir(), "README.md"), encoding="utf-8") as file:
        return BLOCK.findall(file.read())


def interpreters():
    """Pythons that may have an example's modules."""
    return [sys.executable, os.path.join(build_dir(), "openai-venv", "bin", "python3")]


def python_with(modules):
    for python in interpreters():
        check = "import " + ", ".join(modules) if modules else "pass"
        if os.path.exists(python) and subprocess.run([python, "-c", check], capture_output=True).returncode == 0:
            return python
    return None


class Readme(unittest.TestCase):
    def test_there_are_examples_of_every_kind(self):
        everything = " ".join(language + code for _, language, code in examples())
        for part in ("curl", "from openai import OpenAI", "grpc", "generate", "eval", "bench"):
            self.assertIn(part, everything)

    def test_links_lead_somewhere(self):
        for document in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "deploy/README.md"):
            path = os.path.join(source_dir(), document)
            with open(path, encoding="utf-8") as file:
                links = re.findall(r"\]\(([^)#]+)[^)]*\)", file.read())
            for link in links:
                if not link.startswith("http"):
                    with self.subTest(document=document, link=link):
                        self.assertTrue(os.path.exists(os.path.join(os.path.dirname(path), link)))

    def test_examples_run(self):
        with Server() as server, tempfile.TemporaryDirectory() as work:
            for number, (needs, language, code) in enumerate(examples()):
                with self.subTest(example=number, code=code):
                    self.run_example(server, work, needs.split(",") if needs else [], language, code)

    def test_the_curl_line_that_the_server_prints_works(self):
        with Server() as server:
            printed = wait_until(lambda: re.search(r"^\s*(curl http.*)$", server.log(), re.MULTILINE), 10, "a curl line")
            result = subprocess.run(["bash", "-c", printed.group(1)], capture_output=True, text=True, timeout=TIMEOUT_S)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertIn("choices", json.loads(result.stdout))
            for port in (server.http_port, server.grpc_port, server.metrics_port):
                self.assertIn(f":{port}", server.log())

    def run_example(self, server, work, needs, language, code):
        for port, ours in ((8000, server.http_port), (8001, server.grpc_port), (8002, server.metrics_port)):
            code = code.replace(f"localhost:{port}", f"127.0.0.1:{ours}")
        # The build folder may have another name than the preset's.
        code = code.replace("build/cpu-release/atp ", binary() + " ")
        if language in ("sh", "bash"):
            missing = [tool for tool in needs if not shutil.which(tool)]
            if missing:
                self.skipTest(f"not installed: {missing}")
            command = ["bash", "-euo", "pipefail", "-c", code]
        else:
            python = python_with(needs)
            if python is None:
                self.skipTest(f"no Python here has {needs}")
            command = [python, "-c", code]
        env = dict(os.environ, TMPDIR=work, PYTHONDONTWRITEBYTECODE="1")
        result = subprocess.run(command, cwd=source_dir(), env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
        output = result.stdout
        self.assertEqual(result.returncode, 0, f"{output}\n{result.stderr}")
        self.assertTrue(output.strip(), "it printed nothing")
        # curl exits with 0 for an error status, too.
        if output.lstrip().startswith("{"):
            first = output.strip().splitlines()[0]
            try:
                self.assertNotIn("error", json.loads(output))
            except json.JSONDecodeError:
                self.assertNotIn('"error"', first)


if __name__ == "__main__":
    unittest.main(verbosity=2)
