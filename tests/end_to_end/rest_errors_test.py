"""What the REST front end says to requests that it cannot serve: the status, OpenAI's error shape, the field's name."""

import concurrent.futures
import socket
import unittest

import requests

from http_client import TIMEOUT_S, post
from server_fixture import MODEL, Server, model_config

server = None


def setUpModule():
    global server
    server = Server(settings=["server.max_body_bytes=65536", "server.max_header_bytes=8192"]).start()


def tearDownModule():
    try:
        server.assert_idle()
    finally:
        server.stop()


class Errors(unittest.TestCase):
    def assert_error(self, response, status, param=None, says=None):
        self.assertEqual(response.status_code, status, response.text)
        self.assertTrue(response.headers["content-type"].startswith("application/json"))
        error = response.json()["error"]
        self.assertEqual(set(error), {"message", "type", "param", "code"})
        self.assertTrue(error["message"])
        self.assertTrue(error["type"])
        if param is not None:
            self.assertEqual(error["param"], param, error)
        if says is not None:
            self.assertIn(says, error["message"])
        return error

    def refused(self, param, path="/v1/completions", **fields):
        """The call with these fields is a 400 that names the field."""
        body = {"model": MODEL, "prompt": "x"}
        if path == "/v1/chat/completions":
            body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
        with self.subTest(path=path, **fields):
            self.assert_error(post(server, path, dict(body, **fields)), 400, param)

    def test_not_json(self):
        for data in ("", "{", "[1]", "nul", "{\"prompt\": \"\xff\"", "[" * 20000):
            response = requests.post(server.url + "/v1/completions", data=data.encode("latin-1"),
                                     headers={"content-type": "application/json"}, timeout=TIMEOUT_S)
            self.assert_error(response, 400)

    def test_wrong_types_name_the_field(self):
        self.refused("max_tokens", max_tokens="ten")
        self.refused("max_tokens", max_tokens=1.5)
        self.refused("temperature", temperature="warm")
        self.refused("stream", stream="yes")
        self.refused("stop", stop=7)
        self.refused("logit_bias", logit_bias=[1])
        self.refused("prompt", prompt={"a": 1})
        self.refused("prompt", prompt=[1, "two"])
        self.refused("messages", "/v1/chat/completions", messages="hello")
        self.refused("messages", "/v1/chat/completions", messages=[])
        self.refused("logprobs", "/v1/chat/completions", logprobs=5)

    def test_ranges_name_the_field(self):
        self.refused("temperature", temperature=-1)
        self.refused("top_p", top_p=0)
        self.refused("top_p", top_p=1.5)
        self.refused("presence_penalty", presence_penalty=3)
        self.refused("frequency_penalty", frequency_penalty=-3)
        self.refused("n", n=0)
        self.refused("n", n=1000)
        self.refused("logprobs", logprobs=1000)
        self.refused("max_tokens", max_tokens=-1)
        self.refused("top_logprobs", "/v1/chat/completions", logprobs=True, top_logprobs=1000)
        self.refused("temperature", "/v1/chat/completions", temperature=1e9)

    def test_missing_fields(self):
        self.assert_error(post(server, "/v1/completions", {"model": MODEL}), 400, "prompt")
        self.assert_error(post(server, "/v1/chat/completions", {"model": MODEL}), 400, "messages")

    def test_a_prompt_that_never_fits_says_the_numbers(self):
        positions = model_config()["max_position_embeddings"]
        error = self.assert_error(post(server, "/v1/completions", {"model": MODEL, "prompt": "word " * 2 * positions}), 400)
        self.assertRegex(error["message"], rf"\b{positions}\b")
        self.assertEqual(error["code"], "context_length_exceeded")
        ids = [5] * 10 + [10 ** 6]
        self.assert_error(post(server, "/v1/completions", {"model": MODEL, "prompt": ids}), 400)

    def test_log_probabilities_of_prompts_are_bounded(self):
        body = {"model": MODEL, "prompt": [[5] * 1000] * 8, "echo": True, "logprobs": 10, "n": 16, "max_tokens": 0}
        error = self.assert_error(post(server, "/v1/completions", body), 400)
        self.assertEqual(error["param"], "logprobs")

    def test_unknown_model_and_path(self):
        response = post(server, "/v1/completions", {"model": "gpt-17", "prompt": "x"})
        self.assert_error(response, 404, says="gpt-17")
        self.assert_error(post(server, "/v1/nothing", {}), 404)
        self.assert_error(requests.get(server.url + "/../../etc/passwd", timeout=TIMEOUT_S), 404)

    def test_wrong_method(self):
        response = requests.get(server.url + "/v1/completions", timeout=TIMEOUT_S)
        self.assert_error(response, 405)
        self.assertIn("POST", response.headers["allow"])
        self.assert_error(requests.post(server.url + "/v1/models", timeout=TIMEOUT_S), 405)

    def test_body_too_large(self):
        response = post(server, "/v1/completions", {"model": MODEL, "prompt": "x" * 100000})
        self.assert_error(response, 413, says="65536")

    def test_headers_too_large(self):
        with socket.create_connection(("127.0.0.1", server.http_port), TIMEOUT_S) as s:
            s.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 20000 + b"\r\n\r\n")
            s.settimeout(TIMEOUT_S)
            status = s.recv(100).split(b"\r\n")[0]
        self.assertIn(b"431", status)

    def test_not_http(self):
        with socket.create_connection(("127.0.0.1", server.http_port), TIMEOUT_S) as s:
            s.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01 hello\r\n\r\n")
            s.settimeout(TIMEOUT_S)
            answer = s.recv(1000)
        self.assertTrue(answer == b"" or b" 400 " in answer, answer)
        self.assertEqual(requests.get(server.url + "/v1/models", timeout=TIMEOUT_S).status_code, 200)

    def test_stream_errors_come_as_a_plain_status(self):
        self.refused("temperature", stream=True, temperature=-1)


class Keys(unittest.TestCase):
    def test_api_keys(self):
        with Server(settings=["server.api_keys=[first-key, second-key]"]) as locked:
            def status(path, key, scheme="Bearer"):
                headers = {"authorization": f"{scheme} {key}"} if key is not None else {}
                return requests.get(locked.url + path, headers=headers, timeout=TIMEOUT_S)
            for key in (None, "", "wrong", "first-ke", "first-key2"):
                response = status("/v1/models", key)
                self.assertEqual(response.status_code, 401, key)
                self.assertEqual(set(response.json()["error"]), {"message", "type", "param", "code"})
            self.assertEqual(status("/v1/models", "first-key", "Basic").status_code, 401)
            for key in ("first-key", "second-key"):
                self.assertEqual(status("/v1/models", key).status_code, 200)
            self.assertEqual(post(locked, "/tokenize", {"prompt": "x"}).status_code, 401)
            self.assertEqual(post(locked, "/v1/completions", {"prompt": "x"}).status_code, 401)
            # Probes and scrapes carry no key.
            for path in ("/health/live", "/health/ready", "/metrics"):
                self.assertEqual(status(path, None).status_code, 200, path)
            self.assertNotIn("first-key", locked.log())


class FullQueue(unittest.TestCase):
    def test_429_with_retry_after(self):
        settings = ["scheduler.max_running_requests=1", "scheduler.max_waiting_requests=2",
                    "backend.device=reference"]
        body = {"model": MODEL, "prompt": "The queue", "max_tokens": 60, "ignore_eos": True}
        with Server(settings=settings) as small:
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                responses = list(pool.map(lambda _: post(small, "/v1/completions", body), range(16)))
            by_status = {}
            for response in responses:
                by_status.setdefault(response.status_code, []).append(response)
            self.assertEqual(set(by_status), {200, 429})
            self.assertGreaterEqual(len(by_status[200]), 3)  # one runs, two wait
            for response in by_status[429]:
                self.assertGreaterEqual(int(response.headers["retry-after"]), 1)
                self.assertEqual(set(response.json()["error"]), {"message", "type", "param", "code"})
            small.assert_idle()
            self.assertEqual(post(small, "/v1/completions", dict(body, max_tokens=2)).status_code, 200)
            # More prompts than may wait would be told to try again for ever.
            many = post(small, "/v1/completions", dict(body, prompt=["a", "b", "c"], max_tokens=2))
            self.assertEqual((many.status_code, many.json()["error"]["param"]), (400, "prompt"))


if __name__ == "__main__":
    unittest.main(verbosity=2)
