"""Starts a real `atp serve` on free loopback ports for a test, and sees to it that it ends well.

    with Server(settings=["scheduler.max_running_requests=1"]) as server:
        requests.get(server.url + "/v1/models")

Leaving the block sends SIGTERM and fails when the server does not exit with 0 in time. Every wait here is bounded.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

import requests

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 60
MODEL = "default"

# No proxy stands between a test and loopback.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"


def source_dir():
    default = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
    return os.path.abspath(os.environ.get("ATP_SOURCE_DIR", default))


def model_config():
    """What config.json says of the default model."""
    with open(os.path.join(source_dir(), "models", "default", "config.json"), encoding="utf-8") as file:
        return json.load(file)


def build_dir():
    """Where tests may keep what they make: the build folder, else a temporary one."""
    return os.environ.get("ATP_BUILD_DIR") or os.path.join(tempfile.gettempdir(), f"atp-tests-{os.getuid()}")


def binary():
    default = os.path.join(source_dir(), "build", "cpu-release", "atp")
    path = os.environ.get("ATP_BINARY", default)
    if not os.path.exists(path):
        sys.exit(f"no server to test: {path} does not exist; build it, or set ATP_BINARY")
    return path


def skip(reason):
    """Ends the whole test program as skipped, as CTest's SKIP_RETURN_CODE has it."""
    print(f"SKIPPED: {reason}", file=sys.stderr, flush=True)
    sys.exit(77)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def wait_until(condition, timeout_s, what, period_s=0.02):
    """Returns the first true value of condition(); AssertionError naming `what` after timeout_s."""
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(period_s)


_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)$")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')


def parse_metrics(text):
    """Prometheus text format -> {name: [(labels, value), …]}. A line that is not in that format fails."""
    samples = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        match = _SAMPLE.match(line)
        assert match, f"not a line of the text format: {line!r}"
        name, labels, value = match.groups()
        samples.setdefault(name, []).append((dict(_LABEL.findall(labels or "")), float(value)))
    return samples


class Server:
    def __init__(self, settings=(), args=(), model_dir=None, expected_exit=0):
        self.settings = list(settings)
        self.args = list(args)
        self.model_dir = model_dir or os.path.join(source_dir(), "models", "default")
        self.expected_exit = expected_exit
        self.process = None

    def __enter__(self):
        return self.start()

    def __exit__(self, kind, value, traceback):
        if kind is None:
            self.stop()
            return
        # The test has failed already: what matters is why, and that nothing is left behind.
        self.show_log()
        self.kill()
        self._log.close()

    def start(self):
        # Another program may take a port between finding it free and using it: then once more.
        for attempt in range(3):
            self._launch()
            if self._wait_ready():
                return self
            log = self.log()
            if "in use" not in log or attempt == 2:
                raise AssertionError(f"the server did not start, exit code {self.process.returncode}:\n{log}")
        raise AssertionError("unreachable")

    def _launch(self):
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.metrics_url = f"http://127.0.0.1:{self.metrics_port}"
        self.grpc_target = f"127.0.0.1:{self.grpc_port}"
        self._signalled = False
        self._log = tempfile.NamedTemporaryFile(prefix="atp-serve-", suffix=".log")
        command = [binary(), "serve", "--model", self.model_dir, "--http-port", str(self.http_port),
                   "--grpc-port", str(self.grpc_port), "--metrics-port", str(self.metrics_port)]
        settings = ["backend.threads=2", "kv_cache.memory_bytes=67108864"] + self.settings
        for setting in settings:
            command += ["--set", setting]
        self.process = subprocess.Popen(command + self.args, stdin=subprocess.DEVNULL, stdout=self._log,
                                        stderr=subprocess.STDOUT, cwd=source_dir())

    def _wait_ready(self):
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                return False
            with contextlib.suppress(requests.RequestException):
                if requests.get(self.metrics_url + "/health/ready", timeout=2).status_code == 200:
                    return True
            time.sleep(0.02)
        log = self.log()
        self.kill()
        raise AssertionError(f"the server was not ready within {START_TIMEOUT_S} s:\n{log}")

    def log(self):
        with open(self._log.name, encoding="utf-8", errors="replace") as file:
            return file.read()

    def show_log(self, last_lines=60):
        lines = self.log().splitlines()[-last_lines:]
        print("---- the server's last lines ----", *lines, sep="\n", file=sys.stderr)

    def signal(self, number=signal.SIGTERM):
        self._signalled = True
        self.process.send_signal(number)

    def wait(self, timeout_s=STOP_TIMEOUT_S):
        """The exit code; a server that hangs is killed, and that is a failure."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            self.show_log()
            raise AssertionError(f"the server did not end within {timeout_s} s") from None

    def kill(self):
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)

    def stop(self):
        if self.process is None:
            return
        # A second signal would say: not so gently.
        if self.process.poll() is None and not self._signalled:
            self.signal(signal.SIGTERM)
        code = self.wait()
        self.process = None
        if code != self.expected_exit:
            self.show_log()
        self._log.close()
        if code != self.expected_exit:
            raise AssertionError(f"the server ended with {code}, expected {self.expected_exit}")

    def threads(self):
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def metrics(self):
        response = requests.get(self.metrics_url + "/metrics", timeout=10)
        response.raise_for_status()
        return parse_metrics(response.text)

    def metric(self, name, **labels):
        """Sum of the samples of `name` that carry these labels; 0 where there is none yet."""
        samples = self.metrics().get(name, [])
        return sum(value for found, value in samples if labels.items() <= found.items())

    def assert_idle(self, timeout_s=20):
        """Nothing runs, nothing waits and no block is held by a sequence: what a leak would prevent."""
        def idle():
            samples = self.metrics()
            values = {}
            for name in ("atp_requests_running", "atp_requests_waiting", "atp_kv_cache_blocks_used"):
                assert name in samples, f"no metric {name}"
                values[name] = sum(value for _, value in samples[name])
            self._busy = values
            return not any(values.values())
        try:
            wait_until(idle, timeout_s, "idle server")
        except AssertionError:
            raise AssertionError(f"the server is not idle after {timeout_s} s: {self._busy}") from None
