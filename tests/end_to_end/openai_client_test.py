"""The official `openai` Python client against the running server: what most users will come with.

The client comes from PyPI (or the index that pip is configured with) into a venv in the build folder, kept between
runs. Where no index answers, this test is skipped, visibly; rest_test.py makes the same calls with plain HTTP.
"""

import asyncio
import importlib.util
import os
import subprocess
import sys
import unittest

CLIENT = "openai>=1.40,<4"
PIP_TIMEOUT_S = 240


def run_inside_venv():
    """Makes the venv where there is none and starts this program in it; skips when the client cannot be had."""
    from server_fixture import build_dir, skip
    venv = os.path.join(build_dir(), "openai-venv")
    python = os.path.join(venv, "bin", "python3")
    ready = os.path.join(venv, "installed")
    if not os.path.exists(ready):
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True, timeout=60)
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--timeout", "5",
                            "--retries", "0", CLIENT, "requests"], check=True, timeout=PIP_TIMEOUT_S)
        except (subprocess.SubprocessError, OSError) as error:
            skip(f"the openai Python client could not be installed from a package index: {error}")
        with open(ready, "w", encoding="utf-8"):
            pass
    os.environ["ATP_IN_OPENAI_VENV"] = "1"
    os.execv(python, [python] + sys.argv)


if importlib.util.find_spec("openai") is None and "ATP_IN_OPENAI_VENV" not in os.environ:
    run_inside_venv()

import openai  # noqa: E402

from server_fixture import MODEL, Server, model_config, wait_until  # noqa: E402

PROMPT = "It was a dark and stormy night, and the old man"
MESSAGES = [{"role": "user", "content": "Who are you?"}]
# What the server understands beyond OpenAI's fields goes through extra_body.
IGNORE_EOS = {"ignore_eos": True}

server = None
client = None


def setUpModule():
    global server, client
    settings = ["server.api_keys=[test-key]", "server.max_body_bytes=65536"]
    server = Server(settings=settings).start()
    client = connect()


def tearDownModule():
    try:
        client.close()
        server.assert_idle()
    finally:
        server.stop()


def connect(kind=None, key="test-key"):
    # No retries: an error must be seen, not smoothed over.
    return (kind or openai.OpenAI)(base_url=server.url + "/v1", api_key=key, max_retries=0, timeout=120)


def complete(**parameters):
    defaults = dict(model=MODEL, prompt=PROMPT, max_tokens=20, seed=42, extra_body=IGNORE_EOS)
    return client.completions.create(**dict(defaults, **parameters))


def chat(**parameters):
    defaults = dict(model=MODEL, messages=MESSAGES, max_completion_tokens=20, seed=42, extra_body=IGNORE_EOS)
    return client.chat.completions.create(**dict(defaults, **parameters))


class Calls(unittest.TestCase):
    def test_models(self):
        self.assertEqual([model.id for model in client.models.list()], [MODEL])
        self.assertEqual(client.models.retrieve(MODEL).id, MODEL)

    def test_completion(self):
        answer = complete(n=2, logprobs=2)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1])
        for choice in answer.choices:
            self.assertEqual(choice.finish_reason, "length")
            # (Each line is a text of its own to this model's tokenizer.)
            self.assertEqual("".join(choice.logprobs.tokens).replace("\n ", "\n"), choice.text)
        self.assertEqual(answer.usage.completion_tokens, 40)
        self.assertEqual(answer.choices[0].text, complete().choices[0].text)

    def test_completion_stream(self):
        chunks = list(complete(stream=True, stream_options={"include_usage": True}))
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
        self.assertEqual(text, complete().choices[0].text)
        self.assertEqual(chunks[-1].usage.completion_tokens, 20)

    def test_stop_and_echo(self):
        words = complete(temperature=0).choices[0].text.split(" ")
        stop = " ".join(words[2:4])
        answer = complete(temperature=0, stop=[stop], echo=True).choices[0]
        self.assertEqual(answer.finish_reason, "stop")
        self.assertTrue(answer.text.startswith(PROMPT))
        self.assertNotIn(stop, answer.text[len(PROMPT):])

    def test_chat(self):
        answer = chat(logprobs=True, top_logprobs=2)
        (choice,) = answer.choices
        self.assertEqual(choice.message.role, "assistant")
        self.assertEqual(len(choice.logprobs.content), 20)
        self.assertEqual(len(choice.logprobs.content[0].top_logprobs), 2)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + 20)
        self.assertGreaterEqual(answer.usage.prompt_tokens_details.cached_tokens, 0)

    def test_chat_stream(self):
        chunks = list(chat(stream=True, stream_options={"include_usage": True}))
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        self.assertEqual(text, chat().choices[0].message.content)
        self.assertEqual(chunks[-2].choices[0].finish_reason, "length")
        self.assertEqual(chunks[-1].usage.completion_tokens, 20)

    def test_request_id(self):
        answer = chat(extra_headers={"x-request-id": "from-openai-client"})
        self.assertEqual(answer._request_id, "from-openai-client")


class Errors(unittest.TestCase):
    def test_bad_request_names_the_field(self):
        for call, field, value in ((complete, "temperature", -1), (chat, "top_p", 7), (complete, "n", 1000),
                                   (chat, "frequency_penalty", 5)):
            with self.subTest(field=field), self.assertRaises(openai.BadRequestError) as caught:
                call(**{field: value})
            self.assertEqual(caught.exception.param, field)
            self.assertEqual(caught.exception.status_code, 400)

    def test_bad_request_of_a_stream(self):
        with self.assertRaises(openai.BadRequestError):
            chat(stream=True, temperature=-1)

    def test_authentication(self):
        with connect(key="wrong") as stranger, self.assertRaises(openai.AuthenticationError):
            stranger.models.list()

    def test_unknown_model(self):
        with self.assertRaises(openai.NotFoundError):
            complete(model="gpt-17")

    def test_too_long(self):
        with self.assertRaises(openai.BadRequestError):
            complete(prompt="word " * 2 * model_config()["max_position_embeddings"])
        with self.assertRaises(openai.APIStatusError) as caught:
            complete(prompt="x" * 100000)
        self.assertEqual(caught.exception.status_code, 413)


class Streams(unittest.TestCase):
    def test_cancel_in_mid_stream(self):
        def cancelled():
            return server.metric("atp_requests_finished_total", reason="cancelled")
        before = cancelled()
        stream = complete(n=16, max_tokens=400, stream=True)
        next(iter(stream))
        stream.close()
        server.assert_idle()
        wait_until(lambda: cancelled() > before, 10, "a cancelled request in the metrics")

    def test_64_at_once(self):
        expected = [chat(seed=i).choices[0].message.content for i in range(8)]

        async def one(many, i):
            parameters = dict(model=MODEL, messages=MESSAGES, max_completion_tokens=20, seed=i % 8,
                              extra_body=IGNORE_EOS)
            if i % 2 == 0:
                answer = await many.chat.completions.create(**parameters)
                return answer.choices[0].message.content
            text = ""
            async for chunk in await many.chat.completions.create(stream=True, **parameters):
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
            return text

        async def run():
            async with connect(openai.AsyncOpenAI) as many:
                return await asyncio.gather(*(one(many, i) for i in range(64)))
        self.assertEqual(asyncio.run(run()), [expected[i % 8] for i in range(64)])
        server.assert_idle()


if __name__ == "__main__":
    unittest.main(verbosity=2)
