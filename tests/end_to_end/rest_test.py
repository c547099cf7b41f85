"""The OpenAI-style REST front end, call by call, against the running server, with a plain HTTP client."""

import math
import unittest

import requests

from http_client import TIMEOUT_S, call, chat, completion, stream, text
from server_fixture import MODEL, Server

PROMPT = "It was a dark and stormy night, and the old man"
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
SEEDED = {"temperature": 1, "seed": 42, "max_tokens": 24, "ignore_eos": True}

server = None


def setUpModule():
    global server
    server = Server().start()


def tearDownModule():
    try:
        server.assert_idle()
    finally:
        server.stop()


def get(path):
    return requests.get(server.url + path, timeout=TIMEOUT_S)


def texts_by_index(events):
    """index -> the concatenated text of a streamed completion."""
    texts = {}
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


class Information(unittest.TestCase):
    def test_models(self):
        models = get("/v1/models").json()
        self.assertEqual(models["object"], "list")
        self.assertEqual([m["id"] for m in models["data"]], [MODEL])
        self.assertEqual(models["data"][0]["object"], "model")
        self.assertGreater(models["data"][0]["created"], 0)

    def test_version(self):
        self.assertRegex(get("/version").json()["version"], r"^\d+\.\d+\.\d+")

    def test_health(self):
        for path in ("/health", "/health/live", "/health/ready"):
            for base in (server.url, server.metrics_url):
                self.assertEqual(requests.get(base + path, timeout=TIMEOUT_S).status_code, 200, base + path)

    def test_metrics_on_both_ports(self):
        for base in (server.url, server.metrics_url):
            response = requests.get(base + "/metrics", timeout=TIMEOUT_S)
            self.assertEqual(response.status_code, 200)
            self.assertTrue(response.headers["content-type"].startswith("text/plain"))
            self.assertIn("atp_requests_running", response.text)
            self.assertIn("vllm:num_requests_waiting", response.text)

    def test_tokenize_and_detokenize(self):
        # (Not with double spaces or tabs: this model's normalizer folds them.)
        for sample in ("Hello, world!", "naïve – 東京 🎉", "One line.\n\n\"Another,\" he said.\nA third.", ""):
            tokenized = call(server, "/tokenize", {"model": MODEL, "prompt": sample, "add_special_tokens": False})
            self.assertEqual(tokenized["count"], len(tokenized["tokens"]))
            back = call(server, "/detokenize", {"model": MODEL, "tokens": tokenized["tokens"]})
            self.assertEqual(back["prompt"], sample)

    def test_special_tokens_are_added_unless_refused(self):
        plain = call(server, "/tokenize", {"prompt": "hello", "add_special_tokens": False})["tokens"]
        self.assertEqual(call(server, "/tokenize", {"prompt": "hello"})["tokens"], [1] + plain)

    def test_usage_counts_what_tokenize_counts(self):
        count = call(server, "/tokenize", {"prompt": PROMPT})["count"]
        self.assertEqual(completion(server, PROMPT, **GREEDY)["usage"]["prompt_tokens"], count)


class Completions(unittest.TestCase):
    def test_shape(self):
        answer = completion(server, PROMPT, **GREEDY)
        self.assertEqual(answer["object"], "text_completion")
        self.assertEqual(answer["model"], MODEL)
        self.assertTrue(answer["id"])
        self.assertGreater(answer["created"], 0)
        (choice,) = answer["choices"]
        self.assertEqual(choice["index"], 0)
        self.assertEqual(choice["finish_reason"], "length")
        self.assertIsNone(choice["logprobs"])
        self.assertTrue(choice["text"].strip())
        usage = answer["usage"]
        self.assertEqual(usage["completion_tokens"], 24)
        self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + 24)

    def test_default_max_tokens_is_sixteen(self):
        answer = completion(server, PROMPT, ignore_eos=True)
        self.assertEqual(answer["usage"]["completion_tokens"], 16)

    def test_stream_is_the_same_text(self):
        for parameters in (GREEDY, SEEDED):
            events = stream(server, "/v1/completions", dict(parameters, model=MODEL, prompt=PROMPT))
            # How many pieces there are depends on how fast the client reads: pending ones are joined.
            self.assertGreaterEqual(len(events), 2)
            self.assertEqual(len({e["id"] for e in events}), 1)
            self.assertTrue(all(e["object"] == "text_completion" for e in events))
            self.assertEqual(texts_by_index(events)[0], text(server, PROMPT, **parameters))
            reasons = [c["finish_reason"] for e in events for c in e["choices"]]
            self.assertEqual(reasons[-1], "length")
            self.assertEqual(set(reasons[:-1]) - {None}, set())

    def test_several_prompts_and_token_prompts(self):
        prompts = ["The sea", "A horse", "My dear"]
        answer = completion(server, prompts, n=2, **SEEDED)
        self.assertEqual([c["index"] for c in answer["choices"]], list(range(6)))
        for i, prompt in enumerate(prompts):
            self.assertEqual(answer["choices"][2 * i]["text"], text(server, prompt, **SEEDED))
        ids = [call(server, "/tokenize", {"prompt": p})["tokens"] for p in prompts]
        self.assertEqual(text(server, ids[0], **SEEDED), text(server, prompts[0], **SEEDED))
        by_ids = completion(server, ids, **SEEDED)
        self.assertEqual([c["text"] for c in by_ids["choices"]], [text(server, p, **SEEDED) for p in prompts])

    def test_n_answers_have_consecutive_seeds(self):
        answer = completion(server, PROMPT, n=3, **SEEDED)
        found = [choice["text"] for choice in answer["choices"]]
        alone = [text(server, PROMPT, **dict(SEEDED, seed=42 + i)) for i in range(3)]
        self.assertEqual(found, alone)
        self.assertEqual(len(set(found)), 3)
        self.assertEqual(answer["usage"]["completion_tokens"], 72)
        streamed = stream(server, "/v1/completions", dict(SEEDED, model=MODEL, prompt=PROMPT, n=3))
        self.assertEqual(texts_by_index(streamed), dict(enumerate(alone)))

    def test_seeds_reproduce(self):
        first = text(server, PROMPT, **SEEDED)
        self.assertEqual(first, text(server, PROMPT, **SEEDED))
        self.assertNotEqual(first, text(server, PROMPT, **dict(SEEDED, seed=43)))

    def test_stop_string_ends_the_text_and_never_leaks(self):
        whole = text(server, PROMPT, **GREEDY)
        # Two words from the middle: a stop string that spans tokens.
        words = whole.split(" ")
        stop = " ".join(words[len(words) // 2:len(words) // 2 + 2])
        expected = whole[:whole.index(stop)]
        answer = completion(server, PROMPT, stop=stop, **GREEDY)
        self.assertEqual(answer["choices"][0]["text"], expected)
        self.assertEqual(answer["choices"][0]["finish_reason"], "stop")
        self.assertEqual(text(server, PROMPT, stop=["never in there", stop], **GREEDY), expected)
        events = stream(server, "/v1/completions", dict(GREEDY, model=MODEL, prompt=PROMPT, stop=[stop]))
        self.assertEqual(texts_by_index(events)[0], expected)

    def test_logprobs(self):
        answer = completion(server, PROMPT, logprobs=2, repetition_penalty=1, **GREEDY)["choices"][0]
        logprobs = answer["logprobs"]
        # Each line is a text of its own to this model's tokenizer: the space that begins its first token is not text.
        self.assertEqual("".join(logprobs["tokens"]).replace("\n ", "\n"), answer["text"])
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"]):
            found = answer["text"][offset:]
            self.assertTrue(found.startswith(token) or found.startswith(token.lstrip(" ")), (token, offset))
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            self.assertEqual(len(logprobs[name]), 24, name)
        for token, logprob, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]):
            self.assertLessEqual(logprob, 0)
            # Greedy takes the most likely one.
            self.assertAlmostEqual(logprob, max(top.values()), places=5)
            self.assertIn(token, top)
            self.assertLessEqual(sum(math.exp(v) for v in top.values()), 1 + 1e-4)

    def test_logprobs_of_a_stream_are_the_same(self):
        whole = completion(server, PROMPT, logprobs=1, **SEEDED)["choices"][0]["logprobs"]
        pieces = stream(server, "/v1/completions", dict(SEEDED, model=MODEL, prompt=PROMPT, logprobs=1))
        parts = [c["logprobs"] for e in pieces for c in e["choices"] if c["logprobs"]]
        for name in ("tokens", "token_logprobs", "text_offset"):
            self.assertEqual([x for part in parts for x in part[name]], whole[name], name)

    def test_echo_with_logprobs_scores_the_prompt(self):
        count = call(server, "/tokenize", {"prompt": PROMPT})["count"]
        answer = completion(server, PROMPT, echo=True, logprobs=0, max_tokens=0)
        (choice,) = answer["choices"]
        self.assertEqual(choice["text"], PROMPT)
        self.assertEqual(answer["usage"]["completion_tokens"], 0)
        values = choice["logprobs"]["token_logprobs"]
        self.assertEqual(len(values), count)
        self.assertIsNone(values[0])
        self.assertTrue(all(v <= 0 for v in values[1:]))
        both = text(server, PROMPT, echo=True, **GREEDY)
        self.assertEqual(both, PROMPT + text(server, PROMPT, **GREEDY))

    def test_include_usage_comes_last_and_alone(self):
        body = dict(GREEDY, model=MODEL, prompt=PROMPT, stream_options={"include_usage": True})
        events = stream(server, "/v1/completions", body)
        self.assertEqual(events[-1]["choices"], [])
        self.assertEqual(events[-1]["usage"]["completion_tokens"], 24)
        self.assertTrue(all(e.get("usage") is None for e in events[:-1]))
        without = stream(server, "/v1/completions", dict(GREEDY, model=MODEL, prompt=PROMPT))
        self.assertTrue(all(e.get("usage") is None and e["choices"] for e in without))

    def test_prefix_cache_is_reported_and_changes_nothing(self):
        prompt = "A prompt of its own, long enough for several blocks of the cache. " * 6
        first = completion(server, prompt, logprobs=0, **GREEDY)
        second = completion(server, prompt, logprobs=0, **GREEDY)
        self.assertEqual(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0)
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        self.assertGreater(cached, 0)
        self.assertLess(cached, second["usage"]["prompt_tokens"])
        self.assertEqual(first["choices"], second["choices"])

    def test_logit_bias_and_penalties_act(self):
        plain = completion(server, PROMPT, logprobs=0, **GREEDY)
        token = call(server, "/tokenize", {"prompt": " sea", "add_special_tokens": False})["tokens"][-1]
        forced = completion(server, PROMPT, logit_bias={str(token): 100}, **dict(GREEDY, max_tokens=4))
        piece = call(server, "/detokenize", {"tokens": [token] * 4})["prompt"]
        self.assertEqual(forced["choices"][0]["text"].strip(), piece.strip())
        banned = completion(server, PROMPT, frequency_penalty=2, presence_penalty=2, repetition_penalty=5, **GREEDY)
        self.assertNotEqual(banned["choices"][0]["text"], plain["choices"][0]["text"])

    def test_unknown_fields_and_nulls_are_ignored(self):
        expected = text(server, PROMPT, **GREEDY)
        found = text(server, PROMPT, user="u", suffix=None, stop=None, logprobs=None, metadata={"a": 1}, **GREEDY)
        self.assertEqual(found, expected)


class Chat(unittest.TestCase):
    def test_shape(self):
        answer = chat(server, "Tell me of the sea.", max_tokens=20, temperature=0, ignore_eos=True)
        self.assertEqual(answer["object"], "chat.completion")
        (choice,) = answer["choices"]
        self.assertEqual(choice["message"]["role"], "assistant")
        self.assertTrue(choice["message"]["content"])
        self.assertEqual(choice["finish_reason"], "length")
        self.assertEqual(answer["usage"]["completion_tokens"], 20)

    def test_max_completion_tokens_is_the_newer_name(self):
        answer = chat(server, "Hello.", max_completion_tokens=5, ignore_eos=True)
        self.assertEqual(answer["usage"]["completion_tokens"], 5)

    def test_stream_has_role_content_finish_and_usage(self):
        parameters = {"max_tokens": 20, "seed": 7, "ignore_eos": True}
        body = dict(parameters, model=MODEL, messages=[{"role": "user", "content": "Who are you?"}],
                    stream_options={"include_usage": True})
        events = stream(server, "/v1/chat/completions", body)
        self.assertTrue(all(e["object"] == "chat.completion.chunk" for e in events))
        self.assertEqual(events[0]["choices"][0]["delta"]["role"], "assistant")
        content = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
        self.assertEqual(content, chat(server, "Who are you?", **parameters)["choices"][0]["message"]["content"])
        self.assertEqual(events[-2]["choices"][0]["finish_reason"], "length")
        self.assertEqual(events[-1]["choices"], [])
        self.assertEqual(events[-1]["usage"]["completion_tokens"], 20)

    def test_logprobs(self):
        answer = chat(server, "Hello.", max_tokens=6, logprobs=True, top_logprobs=3, temperature=0, repetition_penalty=1,
                      ignore_eos=True)
        content = answer["choices"][0]["logprobs"]["content"]
        self.assertEqual(len(content), 6)
        for item in content:
            self.assertEqual(len(item["top_logprobs"]), 3)
            self.assertAlmostEqual(item["logprob"], item["top_logprobs"][0]["logprob"], places=5)
            self.assertEqual(bytes(item["bytes"]).decode("utf-8", errors="replace"), item["token"])

    def test_conversation_with_system_and_content_parts(self):
        messages = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Hello."},
                    {"role": "assistant", "content": "Hello!"},
                    {"role": "user", "content": [{"type": "text", "text": "How are you?"}]}]
        parameters = {"model": MODEL, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        parts = call(server, "/v1/chat/completions", dict(parameters, messages=messages))
        messages[-1] = {"role": "user", "content": "How are you?"}
        plain = call(server, "/v1/chat/completions", dict(parameters, messages=messages))
        self.assertEqual(parts["choices"], plain["choices"])

    def test_n(self):
        answer = chat(server, "Hello.", n=2, seed=5, max_tokens=12, ignore_eos=True)
        self.assertEqual([c["index"] for c in answer["choices"]], [0, 1])
        self.assertNotEqual(answer["choices"][0]["message"], answer["choices"][1]["message"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
