"""Connections of the REST front end: many at once, kept alive, cut off; ids and CORS. In the end nothing is leaked."""

import asyncio
import concurrent.futures
import http.client
import json
import socket
import struct
import unittest

import requests

from http_client import TIMEOUT_S, completion, events, post, text
from server_fixture import MODEL, Server, wait_until

ORIGIN = "https://app.example.com"
# Long enough that a client is gone in mid-answer: 16 answers of 300 tokens.
LONG = {"model": MODEL, "prompt": "Once", "n": 16, "max_tokens": 300, "ignore_eos": True}

server = None


def setUpModule():
    global server
    server = Server(settings=[f"server.cors_allowed_origins=[\"{ORIGIN}\"]"]).start()


def tearDownModule():
    try:
        server.assert_idle()
    finally:
        server.stop()


def connect():
    return socket.create_connection(("127.0.0.1", server.http_port), TIMEOUT_S)


def request_bytes(body, close=False):
    data = json.dumps(body).encode()
    head = (f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Connection: {'close' if close else 'keep-alive'}\r\nContent-Length: {len(data)}\r\n\r\n")
    return head.encode() + data


def reset(s):
    """Closes with RST: the client is gone, not done."""
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()


def cancelled():
    return server.metric("atp_requests_finished_total", reason="cancelled")


class Ids(unittest.TestCase):
    def test_request_id_in_and_out(self):
        body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
        response = post(server, "/v1/completions", body, headers={"x-request-id": "from-the-client-1"})
        self.assertEqual(response.headers["x-request-id"], "from-the-client-1")
        ids = {post(server, "/v1/completions", body).headers["x-request-id"] for _ in range(3)}
        self.assertEqual(len(ids), 3)
        self.assertTrue(all(ids))
        failed = post(server, "/v1/completions", {"model": MODEL}, headers={"x-request-id": "bad-1"})
        self.assertEqual(failed.headers["x-request-id"], "bad-1")

    def test_request_id_cannot_split_a_header(self):
        with connect() as s:
            s.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nx-request-id: a\tb\x01c\r\n\r\n")
            answer = b""
            while chunk := s.recv(65536):
                answer += chunk
        self.assertNotIn(b"\x01", answer)


class KeepAlive(unittest.TestCase):
    def test_many_requests_on_one_connection(self):
        connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=TIMEOUT_S)
        connection.connect()
        port = connection.sock.getsockname()[1]
        for i in range(5):
            body = json.dumps({"model": MODEL, "prompt": "Hello", "max_tokens": 3, "stream": i % 2 == 1})
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            response = connection.getresponse()
            self.assertEqual(response.status, 200)
            self.assertTrue(response.read())
            self.assertEqual(connection.sock.getsockname()[1], port, "the connection was not kept")
        # An error keeps it, too.
        connection.request("POST", "/v1/completions", "{", {"content-type": "application/json"})
        self.assertEqual(connection.getresponse().read()[:1], b"{")
        connection.request("GET", "/v1/models")
        self.assertEqual(connection.getresponse().status, 200)
        connection.close()

    def test_connection_close_is_heeded(self):
        with connect() as s:
            s.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = b""
            while chunk := s.recv(65536):
                answer += chunk
        self.assertTrue(answer.startswith(b"HTTP/1.1 200"))

    def test_expect_100_continue_and_slow_body(self):
        data = request_bytes({"model": MODEL, "prompt": "Slow", "max_tokens": 2})
        with connect() as s:
            for i in range(0, len(data), 16):
                s.sendall(data[i:i + 16])
            self.assertTrue(s.recv(65536).startswith(b"HTTP/1.1 200"))


class Cors(unittest.TestCase):
    def test_preflight(self):
        headers = {"origin": ORIGIN, "access-control-request-method": "POST",
                   "access-control-request-headers": "content-type, authorization"}
        response = requests.options(server.url + "/v1/completions", headers=headers, timeout=TIMEOUT_S)
        self.assertIn(response.status_code, (200, 204))
        self.assertEqual(response.headers["access-control-allow-origin"], ORIGIN)
        self.assertIn("POST", response.headers["access-control-allow-methods"])
        allowed = response.headers["access-control-allow-headers"].lower()
        self.assertTrue("authorization" in allowed and "content-type" in allowed, allowed)

    def test_answers_carry_the_origin_only_where_allowed(self):
        def allow(**headers):
            response = requests.get(server.url + "/v1/models", headers=headers, timeout=TIMEOUT_S)
            self.assertEqual(response.status_code, 200)
            return response.headers.get("access-control-allow-origin")
        self.assertEqual(allow(origin=ORIGIN), ORIGIN)
        self.assertIsNone(allow(origin="https://evil.example.com"))
        self.assertIsNone(allow())


class Concurrency(unittest.TestCase):
    def test_64_at_once_streaming_and_not(self):
        def parameters(i):
            return {"temperature": 1, "seed": 1000 + i % 8, "max_tokens": 20, "ignore_eos": True}
        prompts = [f"Chapter {i % 8}. The" for i in range(64)]
        expected = [text(server, prompts[i], **parameters(i)) for i in range(8)]

        def one(i):
            if i % 2:
                return text(server, prompts[i], **parameters(i))
            body = dict(parameters(i), model=MODEL, prompt=prompts[i], stream=True)
            with post(server, "/v1/completions", body, stream=True) as response:
                return "".join(c["text"] for e in events(response) for c in e["choices"])
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            found = list(pool.map(one, range(64)))
        self.assertEqual(found, [expected[i % 8] for i in range(64)])
        server.assert_idle()


    def test_500_streams_without_a_thread_each(self):
        async def one(i):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
            body = {"model": MODEL, "prompt": f"Chapter {i}", "max_tokens": 6, "ignore_eos": True, "stream": True}
            writer.write(request_bytes(body, close=True))
            answer = await reader.read()
            writer.close()
            return answer

        async def all_of_them():
            threads = []

            async def watch():
                while True:
                    threads.append(server.threads())
                    await asyncio.sleep(0.05)
            watcher = asyncio.create_task(watch())
            answers = await asyncio.wait_for(asyncio.gather(*(one(i) for i in range(500))), 300)
            watcher.cancel()
            return answers, max(threads)
        answers, threads = asyncio.run(all_of_them())
        for answer in answers:
            self.assertTrue(answer.startswith(b"HTTP/1.1 200"), answer[:300])
            self.assertIn(b"data: [DONE]", answer)
        self.assertLess(threads, 250)
        server.assert_idle()


class VanishedClients(unittest.TestCase):
    """Whoever goes away frees the blocks: the server is idle soon, and says that it cancelled."""

    def test_closed_in_mid_stream(self):
        before = cancelled()
        with post(server, "/v1/completions", dict(LONG, stream=True), stream=True) as response:
            self.assertEqual(response.status_code, 200)
            lines = response.iter_lines()
            while not next(lines).startswith(b"data: "):
                pass
            # The client library closes the socket when the block is left.
        server.assert_idle()
        wait_until(lambda: cancelled() > before, 10, "a cancelled request in the metrics")

    def test_reset_while_waiting_for_a_whole_answer(self):
        before = cancelled()
        sockets = []
        for _ in range(4):
            s = connect()
            s.sendall(request_bytes(LONG))
            sockets.append(s)
        wait_until(lambda: server.metric("atp_requests_running") > 0, 20, "a running request")
        for s in sockets:
            reset(s)
        server.assert_idle()
        self.assertGreater(cancelled(), before)

    def test_reset_in_mid_request(self):
        data = request_bytes(LONG)
        for size in (0, 1, 20, 60, len(data) - 1):
            s = connect()
            s.sendall(data[:size])
            reset(s)
        server.assert_idle()
        self.assertTrue(completion(server, "Still here", max_tokens=1)["choices"])

    def test_many_streams_cut_at_once(self):
        def cut(i):
            s = connect()
            s.sendall(request_bytes(dict(LONG, n=2, stream=True, seed=i)))
            s.recv(500)
            if i % 2:
                reset(s)
            else:
                s.close()
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            list(pool.map(cut, range(64)))
        server.assert_idle()


if __name__ == "__main__":
    unittest.main(verbosity=2)
