"""A seeded request gives the same tokens and log probabilities alone, among 16 others, after a prefix-cache hit, and
when blocks run out and it is preempted: seen from a client."""

import concurrent.futures
import unittest

from http_client import completion
from server_fixture import Server

PROMPTS = [f"Chapter {i}. " + "The ship lay at anchor, and nobody spoke. " * (i % 5) for i in range(16)]
PARAMETERS = {"temperature": 1, "max_tokens": 48, "logprobs": 3, "ignore_eos": True}


def answer(server, i):
    (choice,) = completion(server, PROMPTS[i], seed=100 + i, **PARAMETERS)["choices"]
    return choice["text"], choice["logprobs"]


def together(server):
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda i: answer(server, i), range(16)))


class BatchInvariance(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with Server(settings=["kv_cache.prefix_cache=false"]) as server:
            cls.alone = [answer(server, i) for i in range(16)]
        assert len({text for text, _ in cls.alone}) == 16, "16 different answers"

    def assert_same(self, answers):
        for i, (found, expected) in enumerate(zip(answers, self.alone)):
            with self.subTest(request=i):
                self.assertEqual(found, expected)

    def test_among_sixteen(self):
        with Server(settings=["kv_cache.prefix_cache=false", "scheduler.max_prefill_chunk_tokens=48"]) as server:
            self.assert_same(together(server))
            # It is about batches only if there were some.
            samples = server.metrics()
            steps = {labels["le"]: value for labels, value in samples["atp_batch_size_bucket"]}
            self.assertGreater(steps["+Inf"], steps["4"], "steps with more than four sequences")

    def test_after_a_prefix_cache_hit(self):
        with Server() as server:
            together(server)
            self.assert_same(together(server))
            self.assertGreater(server.metric("atp_prefix_cache_hit_tokens_total"), 0)

    def test_after_preemption(self):
        # Blocks for about 400 tokens, where the sixteen need 1,500.
        block_bytes = 16 * 32 * 2 * 2  # entries · head_dim · (key and value) · bf16
        memory = 25 * 8 * 4 * block_bytes  # 25 groups of 16 tokens over 8 layers and 4 kv heads
        settings = [f"kv_cache.memory_bytes={memory}", "kv_cache.prefix_cache=false", "kv_cache.dtype=bf16"]
        with Server(settings=settings) as server:
            self.assert_same(together(server))
            self.assertGreater(server.metric("atp_preemptions_total"), 0)
            server.assert_idle()


if __name__ == "__main__":
    unittest.main(verbosity=2)
