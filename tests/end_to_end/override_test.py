"""Requests that choose their own compression, over REST, gRPC and the Python client, against the running server."""

import os
import sys
import unittest

from http_client import call, post
from server_fixture import MODEL, Server, build_dir, source_dir

sys.path.insert(0, os.path.join(source_dir(), "client", "python"))
sys.path.insert(0, os.path.join(build_dir(), "python"))

import grpc
from atp_client import AtpError, Client

PROMPT = "It was a dark and stormy night, and the old man looked at the sea. " * 12
SETTINGS = ["atp.segment_tokens=32", "atp.window_tokens=32"]
KINDS = [{"preset": "exact"}, {"preset": "quality"}, {"preset": "balanced"}, {"preset": "compact"},
         {"ratio": 0.125, "bits": 8}, {"ratio": 0.5}, {"ratio": 0.5, "bits": 8}]


def body(atp):
    fields = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 100, "ignore_eos": True, "logprobs": 0}
    return fields if atp is None else {**fields, "atp": atp}


def refused(server, atp):
    response = post(server, "/v1/completions", body(atp))
    assert response.status_code == 400, response.text
    return response.json()["error"]


class Override(unittest.TestCase):
    def compare(self, server, kinds):
        """Each kind over REST and gRPC, one after the other: the same text both ways. Returns text by kind."""
        texts = []
        with Client(server.grpc_target) as client:
            for atp in [None] + kinds:
                answer = call(server, "/v1/completions", body(atp))["choices"][0]
                grpc_answer = client.generate(PROMPT, temperature=0, max_tokens=100, ignore_eos=True, atp=atp)
                self.assertEqual(answer["text"], grpc_answer.text, atp)
                texts.append((answer["text"], answer["logprobs"]["token_logprobs"]))
        return texts

    def test_on_a_server_that_compresses(self):
        with Server(settings=SETTINGS) as server:  # the default model has budgets: balanced
            texts = self.compare(server, KINDS + [{"ratio": 0.5, "bits": 4}])
            self.assertEqual(texts[0], texts[3], "balanced is the default")
            self.assertEqual(texts[6], texts[8], "a ratio has the server's bits")
            self.assertEqual(len({str(t) for t in texts}), len(KINDS), "all others differ")
            self.assertGreater(server.metric("atp_tokens_compressed_total"), 0)
            server.assert_idle()

    def test_on_an_exact_server(self):
        # In shorter segments two presets come to the same here: blocks made for exact entries hold few whole pages.
        with Server(settings=["atp.segment_tokens=128", "atp.window_tokens=32", "atp.preset=exact"]) as server:
            texts = self.compare(server, KINDS)
            self.assertEqual(texts[0], texts[1], "exact is the default")
            self.assertEqual(texts[7], texts[6], "a ratio has 8 bits here")
            self.assertEqual(len({str(t) for t in texts}), len(KINDS) - 1, "all others differ")
            server.assert_idle()

    def test_chat(self):
        with Server(settings=SETTINGS + ["atp.preset=exact"]) as server:
            messages = [{"role": "user", "content": PROMPT}]
            answers = [call(server, "/v1/chat/completions",
                            {"messages": messages, "temperature": 0, "max_tokens": 60, "logprobs": True, **extra})
                       for extra in ({}, {"atp": {"preset": "compact"}})]
            logprobs = [[t["logprob"] for t in a["choices"][0]["logprobs"]["content"]] for a in answers]
            self.assertNotEqual(logprobs[0], logprobs[1])

    def test_mistakes_name_the_field(self):
        with Server(settings=SETTINGS) as server:
            for atp, field in (({"preset": "tiny"}, "atp.preset"), ({"ratio": 2}, "atp.ratio"), ({"ratio": 0}, "atp.ratio"),
                               ({"ratio": "1"}, "atp.ratio"), ({"ratio": 0.5, "bits": 5}, "atp.bits"),
                               ({"preset": "compact", "bits": 8}, "atp.bits"), ({}, "atp"), ([1], "atp"),
                               ({"preset": "compact", "ratio": 0.5}, "atp"), ({"cap": 5}, "atp")):
                error = refused(server, atp)
                self.assertEqual((error["param"], error["type"]), (field, "invalid_request_error"), atp)

    def test_refused_where_the_operator_forbids_it(self):
        with Server(settings=["atp.allow_override=false"]) as server:
            error = refused(server, {"preset": "compact"})
            self.assertEqual(error["param"], "atp")
            self.assertIn("atp.allow_override", error["message"])
            with Client(server.grpc_target) as client:
                with self.assertRaises(AtpError) as caught:
                    client.generate("hi", max_tokens=1, atp={"preset": "compact"})
                self.assertEqual(caught.exception.code, grpc.StatusCode.INVALID_ARGUMENT)
                self.assertIn("atp.allow_override", caught.exception.message)
                client.generate("hi", max_tokens=1)


if __name__ == "__main__":
    unittest.main()
