"""atp serve from outside: its start, the lines it prints, ports in use, signals. What it answers is in end_to_end/."""

import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import unittest
import urllib.error
import urllib.request

from atp_binary import BINARY, BLOCK_BYTES, KV_HEADS, LAYERS, MODEL, POSITIONS, ROOT

os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
CACHE_BYTES = 32 << 20
CACHE_BLOCKS = CACHE_BYTES // BLOCK_BYTES
CACHE_TOKENS = CACHE_BLOCKS // (LAYERS * KV_HEADS) * 16
ANY_PORTS = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]


def status(url):
    try:
        return urllib.request.urlopen(url, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


class Process:
    """A server with stdout and stderr in files; killed at the end of the block, whatever happened."""

    def __init__(self, *args):
        self.out, self.err = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()
        self.process = subprocess.Popen([BINARY, "serve", "--model", MODEL, "--set", f"kv_cache.memory_bytes={CACHE_BYTES}", *args],
                                        stdin=subprocess.DEVNULL, stdout=self.out, stderr=self.err, cwd=ROOT)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(20)

    def text(self, which):
        with open(which.name, encoding="utf-8", errors="replace") as file:
            return file.read()

    def wait_for(self, pattern, which=None, timeout_s=60):
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            ended = self.process.poll() is not None
            match = re.search(pattern, self.text(which or self.out))
            if match:
                return match
            if ended:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r}; stdout: {self.text(self.out)}; stderr: {self.text(self.err)}")


class Start(unittest.TestCase):
    def test_prints_url_ports_and_a_curl_line_that_works(self):
        with Process(*ANY_PORTS, "--set", "atp.preset=exact") as server:
            url = server.wait_for(r"REST +(http://127\.0\.0\.1:\d+)").group(1)
            curl = server.wait_for(r"\n +(curl .*)\n").group(1)
            server.wait_for(r"gRPC +127\.0\.0\.1:\d+")
            metrics = server.wait_for(r"metrics +(http://\S+)/metrics").group(1)
            self.assertEqual(status(url + "/health/ready"), 200)
            self.assertEqual(status(metrics + "/health/live"), 200)
            answer = subprocess.run(["bash", "-c", curl.replace("curl ", "curl -sS ", 1)], capture_output=True, timeout=60,
                                    check=True)
            self.assertIn(b'"choices"', answer.stdout)
            line = server.wait_for(r"model=default .*\n", server.err).group(0)
            for part in ("dtype=bf16", "device=\"cpu", f"kv_bytes={CACHE_BLOCKS * BLOCK_BYTES}", f"kv_blocks={CACHE_BLOCKS}",
                         f"kv_tokens={CACHE_TOKENS}", "kv_cache.memory_bytes"):
                self.assertIn(part, line)
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual(server.process.wait(30), 0)

    def test_the_default_cache_is_not_larger_than_can_be_used(self):
        with Process(*ANY_PORTS, "--set", "kv_cache.memory_bytes=0", "--set", "scheduler.max_running_requests=3") as server:
            line = server.wait_for(r"model=default .*\n", server.err).group(0)
            self.assertIn(f"kv_tokens={3 * POSITIONS} ", line)

    def test_says_how_much_context_fits(self):
        def line(*args):
            with Process(*ANY_PORTS, *args) as server:
                return server.wait_for(r"atp=.*\n", server.err).group(0)
        # Sequences end before a segment and a window are full.
        wide = ("--set", f"atp.window_tokens={POSITIONS}")
        self.assertRegex(line(*wide), rf"atp=balanced ratio=0\.\d+ kv_tokens_exact={CACHE_TOKENS} .*nothing is ever compressed")
        self.assertRegex(line("--set", "atp.preset=exact"), rf"kv_tokens_exact={CACHE_TOKENS} calibrate_with=\"atp calibrate --model ")
        short = ("--set", "atp.segment_tokens=64", "--set", "atp.window_tokens=64")
        compressed = line(*short)
        self.assertRegex(compressed, r"atp=balanced ratio=0\.\d+ bits=per_head budgets=\S*atp_budgets\.json segment_tokens=64 window_tokens=64 ")
        tokens = dict(re.findall(r"(kv_tokens_\w+)=(\d+)", compressed))
        self.assertGreater(int(tokens["kv_tokens_compressed"]), 1.5 * int(tokens["kv_tokens_exact"]))
        self.assertIn("atp=ratio ratio=0.3 bits=16 budgets=uniform", line(*short, "--set", "atp.ratio=0.3", "--set", "atp.budgets=uniform"))

    def test_a_broken_budgets_file_is_named(self):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write("{}")
            file.flush()
            with Process(*ANY_PORTS, "--set", f"atp.budgets={file.name}") as server:
                self.assertEqual(server.process.wait(60), 1)
                self.assertIn(f"{file.name}: ratio: missing", server.text(server.err))

    def test_a_key_is_never_printed(self):
        with Process(*ANY_PORTS, "--set", "server.api_keys=[very-secret]") as server:
            self.assertIn("$ATP_API_KEY", server.wait_for(r"\n +(curl .*)\n").group(1))
            self.assertNotIn("very-secret", server.text(server.out) + server.text(server.err))

    def test_ports_in_use(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            for flag in ("--http-port", "--grpc-port", "--metrics-port"):
                args = list(ANY_PORTS)
                args[args.index(flag) + 1] = port
                with Process(*args) as server:
                    self.assertEqual(server.process.wait(60), 1)
                    last = server.text(server.err).splitlines()[-1]
                    self.assertRegex(last, rf"^atp: .*:{port}\b")
                    self.assertNotIn("kv_tokens", server.text(server.err), "known before the model is loaded")

    def test_live_but_not_ready_while_loading(self):
        # config.json is a FIFO that nobody writes to, so that loading takes as long as this test likes.
        with tempfile.TemporaryDirectory() as folder:
            os.mkfifo(os.path.join(folder, "config.json"))
            with Process(*ANY_PORTS, "--model", folder) as server:
                listening = server.wait_for(r"listening http=(\S+) metrics=(\S+)", server.err)
                for address in listening.groups():
                    self.assertEqual(status(f"http://{address}/health/live"), 200)
                    self.assertEqual(status(f"http://{address}/health/ready"), 503)
                self.assertEqual(status(f"http://{listening.group(1)}/v1/models"), 503)
                self.assertIsNone(server.process.poll())
                server.process.send_signal(signal.SIGTERM)
                self.assertEqual(server.process.wait(20), 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
