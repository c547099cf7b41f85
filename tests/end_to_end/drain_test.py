"""SIGTERM: not ready at once, running answers become whole, exit 0. A deadline for the drain, and a second signal."""

import json
import signal
import unittest

import requests

from http_client import TIMEOUT_S, post
from server_fixture import MODEL, Server, wait_until

# The reference backend is slow, so that an answer of a few hundred tokens outlives what happens meanwhile.
SLOW = ["backend.device=reference"]
PATIENT = SLOW + ["server.drain_timeout_ms=600000"]  # under a sanitizer it takes minutes
BODY = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0, "ignore_eos": True, "stream": True}


class Stream:
    """A streamed answer whose first piece has come."""

    def __init__(self, server, max_tokens):
        self.response = post(server, "/v1/completions", dict(BODY, max_tokens=max_tokens), stream=True)
        assert self.response.status_code == 200, self.response.text
        self.lines = (line for line in self.response.iter_lines() if line)
        self.first = next(self.lines)

    def rest(self):
        return [self.first] + list(self.lines)


def text_of(lines):
    events = [json.loads(line[len(b"data: "):]) for line in lines if line != b"data: [DONE]"]
    return "".join(choice["text"] for event in events for choice in event.get("choices", []))


class Drain(unittest.TestCase):
    def test_a_running_stream_completes(self):
        with Server(settings=PATIENT) as server:
            expected = text_of(Stream(server, 200).rest())
            running = Stream(server, 200)
            server.signal(signal.SIGTERM)

            def refused():
                return requests.get(server.metrics_url + "/health/ready", timeout=TIMEOUT_S).status_code == 503
            wait_until(refused, 5, "readiness off")
            # It is still at work: had it ended, nothing would have been shown.
            self.assertEqual(server.metric("atp_requests_running"), 1)
            self.assertEqual(requests.get(server.metrics_url + "/health/live", timeout=TIMEOUT_S).status_code, 200)
            self.assertEqual(server.metric("atp_ready"), 0)
            lines = running.rest()
            self.assertEqual(lines[-1], b"data: [DONE]")
            self.assertEqual(text_of(lines), expected)
            self.assertEqual(server.wait(), 0)

    def test_new_requests_are_refused_while_draining(self):
        with Server(settings=PATIENT) as server:
            running = Stream(server, 200)
            server.signal(signal.SIGTERM)
            wait_until(lambda: server.metric("atp_ready") == 0, 5, "drain begun")
            try:
                response = post(server, "/v1/completions", dict(BODY, stream=False, max_tokens=1))
                self.assertEqual(response.status_code, 503, response.text)
                self.assertEqual(set(response.json()["error"]), {"message", "type", "param", "code"})
            except requests.ConnectionError:
                pass  # not even accepted: as clear
            self.assertEqual(running.rest()[-1], b"data: [DONE]")

    def test_what_outlives_the_drain_is_ended_clearly(self):
        with Server(settings=SLOW + ["server.drain_timeout_ms=300"]) as server:
            running = Stream(server, 450)
            server.signal(signal.SIGTERM)
            lines = running.rest()
            # An error event, or a finish that is not a whole answer's; never a silent end that looks complete.
            last = [json.loads(line[len(b"data: "):]) for line in lines if line != b"data: [DONE]"][-1]
            self.assertIn("error", last)
            self.assertEqual(server.wait(), 0)

    def test_idle_server_ends_at_once(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with Server() as server:
                server.signal(number)
                self.assertEqual(server.wait(10), 0)

    def test_a_second_signal_stops_now(self):
        stopped = 128 + signal.SIGTERM
        with Server(settings=SLOW + ["server.drain_timeout_ms=60000"], expected_exit=stopped) as server:
            running = Stream(server, 450)
            server.signal(signal.SIGTERM)
            wait_until(lambda: server.metric("atp_ready") == 0, 5, "drain begun")
            server.signal(signal.SIGTERM)
            self.assertEqual(server.wait(10), stopped)
            running.response.close()


if __name__ == "__main__":
    unittest.main(verbosity=2)
