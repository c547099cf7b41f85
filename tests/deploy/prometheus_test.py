"""A real Prometheus (Debian's package) scrapes a real server under load, with the configuration of deploy/: the files
are valid, the target is up, and every panel and alert expression returns data. The alerts fire when they should."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import unittest

import requests
import yaml

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "end_to_end"))

from grpc_stubs import inference  # noqa: E402
from server_fixture import MODEL, Server, free_ports, skip, source_dir, wait_until  # noqa: E402

import grpc  # noqa: E402

DEPLOY = os.path.join(source_dir(), "deploy")
RULES = os.path.join(DEPLOY, "prometheus", "alerts.yml")
CONFIG = os.path.join(DEPLOY, "prometheus", "prometheus.yml")
DASHBOARD = os.path.join(DEPLOY, "grafana", "dashboards", "atp.json")
COMPARISON = re.compile(r"^(?P<left>.*\S)\s+(==|!=|>|<|>=|<=)\s+-?[0-9.]+$", re.DOTALL)
LOAD_THREADS = 24

for program in ("prometheus", "promtool"):
    if not shutil.which(program):
        skip(f"{program} is not installed (make deps installs it)")


def load(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file) if path.endswith(".json") else yaml.safe_load(file)


def panel_expressions():
    for panel in load(DASHBOARD)["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def alert_expressions():
    for group in load(RULES)["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


class Load:
    """Traffic of every kind until the block is left: both front ends, streams, shared prompts, more than the queue
    takes (so that there are 429s)."""

    def __init__(self, server):
        self.server = server
        self.end = threading.Event()
        self.threads = [threading.Thread(target=self.client, args=(i,)) for i in range(LOAD_THREADS)]
        self.failures = []

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.end.set()
        for thread in self.threads:
            thread.join(120)

    def client(self, i):
        try:
            with grpc.insecure_channel(self.server.grpc_target) as channel, requests.Session() as session:
                stub = inference.services.InferenceStub(channel)
                while not self.end.is_set():
                    self.one(i, stub, session)
                    self.end.wait(0.05)
        except Exception as error:  # reported by the test, not lost with the thread
            self.failures.append(error)

    def one(self, i, stub, session):
        prompt = f"Chapter {i % 6}. It was a dark and stormy night, and the old man went down to the sea."
        if i % 4 == 0:
            sampling = inference.messages.SamplingParams(max_tokens=32, ignore_eos=True)
            call = inference.messages.GenerateRequest(prompt=prompt, sampling=sampling)
            try:
                stub.Generate(call, timeout=120)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
            return
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 32, "ignore_eos": True, "stream": i % 4 == 1}
        response = session.post(self.server.url + "/v1/completions", json=body, timeout=120)
        assert response.status_code in (200, 429), response.text


class Prometheus:
    """The real one, with the real configuration; only target and intervals are the test's."""

    def __init__(self, server, work):
        config = load(CONFIG)
        config["global"].update(scrape_interval="500ms", evaluation_interval="500ms", scrape_timeout="500ms")
        config["rule_files"] = [RULES]
        (job,) = config["scrape_configs"]
        job["static_configs"][0]["targets"] = [f"127.0.0.1:{server.metrics_port}"]
        path = os.path.join(work, "prometheus.yml")
        with open(path, "w", encoding="utf-8") as file:
            yaml.safe_dump(config, file)
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = os.path.join(work, "prometheus.log")
        with open(self.log_path, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={os.path.join(work, 'data')}",
                 f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self):
        def ready():
            assert self.process.poll() is None, self.log()
            try:
                return requests.get(self.url + "/-/ready", timeout=5).status_code == 200
            except requests.ConnectionError:
                return False
        wait_until(ready, 60, "Prometheus ready", period_s=0.1)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)

    def log(self):
        with open(self.log_path, encoding="utf-8") as file:
            return file.read()

    def query(self, expression):
        response = requests.get(self.url + "/api/v1/query", params={"query": expression}, timeout=30).json()
        assert response["status"] == "success", f"{expression}: {response}"
        return response["data"]["result"]

    def numbers(self, expression):
        """The samples of an instant query that are numbers: NaN is what an empty histogram gives."""
        values = [float(sample["value"][1]) for sample in self.query(expression)]
        return [value for value in values if value == value]


class Files(unittest.TestCase):
    def promtool(self, *arguments):
        result = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    def test_configuration_and_rules_are_valid(self):
        self.promtool("check", "config", CONFIG)
        self.promtool("check", "rules", RULES)

    def test_alerts_fire_when_they_should(self):
        self.promtool("test", "rules", os.path.join(os.path.dirname(os.path.abspath(__file__)), "alerts_test.yml"))

    def test_every_alert_has_a_unit_test(self):
        tests = load(os.path.join(os.path.dirname(os.path.abspath(__file__)), "alerts_test.yml"))
        tested = {case["alertname"] for test in tests["tests"] for case in test["alert_rule_test"] if case["exp_alerts"]}
        self.assertEqual(tested, {name for name, _ in alert_expressions()})


class UnderLoad(unittest.TestCase):
    def test_target_is_up_and_every_expression_returns_data(self):
        # A small queue, so that some requests are refused.
        settings = ["scheduler.max_running_requests=8", "scheduler.max_waiting_requests=4"]
        with tempfile.TemporaryDirectory() as work, Server(settings=settings) as server:
            with Load(server) as traffic, Prometheus(server, work) as prometheus:
                wait_until(lambda: prometheus.numbers('up{job="atp"}') == [1.0], 30, "target up", period_s=0.2)
                for title, expression in panel_expressions():
                    with self.subTest(panel=title, expression=expression):
                        # As Grafana fills them in.
                        query = expression.replace("$__rate_interval", "20s").replace("$instance", ".*")
                        self.assertNotIn("$", query)
                        wait_until(lambda: prometheus.numbers(query), 30, f"data of {query}", period_s=0.2)
                for name, expression in alert_expressions():
                    with self.subTest(alert=name, expression=expression):
                        match = COMPARISON.match(expression)
                        self.assertTrue(match, "not `vector comparison number`")
                        left = match.group("left")
                        wait_until(lambda: prometheus.numbers(left), 30, f"data of {left}", period_s=0.2)
                rules = requests.get(prometheus.url + "/api/v1/rules", timeout=30).json()["data"]["groups"]
                loaded = {rule["name"]: rule["health"] for group in rules for rule in group["rules"]}
                self.assertEqual(loaded, {name: "ok" for name, _ in alert_expressions()})
            self.assertEqual(traffic.failures, [])
            server.assert_idle()


if __name__ == "__main__":
    unittest.main(verbosity=2)
