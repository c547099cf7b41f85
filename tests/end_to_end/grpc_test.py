"""The gRPC front end against the running server, with grpcio and stubs generated from proto/."""

import asyncio
import concurrent.futures
import math
import threading
import unittest

import grpc

from grpc_stubs import health, inference, reflection
from http_client import text
from server_fixture import MODEL, Server, model_config, wait_until

TIMEOUT_S = 120
POSITIONS, VOCABULARY = (model_config()[key] for key in ("max_position_embeddings", "vocab_size"))
PROMPT = "It was a dark and stormy night, and the old man"
pb = inference.messages

server = None
channel = None
stub = None


def setUpModule():
    global server, channel, stub
    server = Server(settings=["server.max_body_bytes=65536"]).start()
    channel = grpc.insecure_channel(server.grpc_target)
    stub = inference.services.InferenceStub(channel)


def tearDownModule():
    try:
        server.assert_idle()
        info = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=TIMEOUT_S)
        assert info.kv_blocks_used == 0, info
    finally:
        channel.close()
        server.stop()


def sampling(**parameters):
    defaults = {"temperature": 1, "seed": 42, "max_tokens": 20, "ignore_eos": True}
    return pb.SamplingParams(**dict(defaults, **parameters))


def request(prompt=PROMPT, **parameters):
    return pb.GenerateRequest(model=MODEL, prompt=prompt, sampling=sampling(**parameters))


def generate(*args, **kwargs):
    return stub.Generate(request(*args, **kwargs), timeout=TIMEOUT_S)


def texts(messages):
    result = {}
    for message in messages:
        result[message.choice.index] = result.get(message.choice.index, "") + message.choice.text
    return result


class Calls(unittest.TestCase):
    def test_generate(self):
        answer = generate()
        self.assertEqual(answer.model, MODEL)
        self.assertTrue(answer.request_id)
        (choice,) = answer.choices
        self.assertEqual(len(choice.tokens), 20)
        self.assertEqual(choice.finish_reason, pb.FINISH_REASON_LENGTH)
        self.assertEqual(answer.usage.completion_tokens, 20)
        tokens = stub.Tokenize(pb.TokenizeRequest(text=PROMPT), timeout=TIMEOUT_S).tokens
        self.assertEqual(answer.usage.prompt_tokens, len(tokens))

    def test_the_same_request_over_rest_gives_the_same_text(self):
        parameters = {"temperature": 1, "seed": 42, "max_tokens": 20, "ignore_eos": True}
        self.assertEqual(generate().choices[0].text, text(server, PROMPT, **parameters))

    def test_stream_is_the_same_answer(self):
        messages = list(stub.GenerateStream(request(n=2), timeout=TIMEOUT_S))
        whole = generate(n=2)
        self.assertEqual(texts(messages), {c.index: c.text for c in whole.choices})
        for choice in whole.choices:
            tokens = [t for m in messages if m.choice.index == choice.index for t in m.choice.tokens]
            self.assertEqual(tokens, list(choice.tokens))
            last = [m for m in messages if m.choice.index == choice.index][-1]
            self.assertEqual(last.choice.finish_reason, pb.FINISH_REASON_LENGTH)
        self.assertTrue(messages[-1].HasField("usage"))
        self.assertEqual(messages[-1].usage.completion_tokens, 40)
        self.assertFalse(any(m.HasField("usage") for m in messages[:-1]))

    def test_token_prompt_and_chat(self):
        tokens = stub.Tokenize(pb.TokenizeRequest(text=PROMPT), timeout=TIMEOUT_S).tokens
        by_ids = pb.GenerateRequest(prompt_tokens=pb.TokenIds(ids=tokens), sampling=sampling())
        self.assertEqual(stub.Generate(by_ids, timeout=TIMEOUT_S).choices[0].text, generate().choices[0].text)
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hello.")])
        answer = stub.Generate(pb.GenerateRequest(chat=chat, sampling=sampling()), timeout=TIMEOUT_S)
        self.assertTrue(answer.choices[0].text)

    def test_logprobs(self):
        choice = generate(logprobs=2, temperature=0, repetition_penalty=1).choices[0]
        self.assertEqual([item.token for item in choice.logprobs], list(choice.tokens))
        for item in choice.logprobs:
            self.assertEqual(len(item.top), 2)
            self.assertEqual(item.top[0].token, item.token)
            self.assertAlmostEqual(item.top[0].logprob, item.logprob, places=6)

    def test_echo(self):
        tokens = stub.Tokenize(pb.TokenizeRequest(text=PROMPT), timeout=TIMEOUT_S).tokens
        choice = generate(echo=True, logprobs=0, max_tokens=0).choices[0]
        self.assertEqual(choice.text, PROMPT)
        self.assertEqual(list(choice.tokens), list(tokens))
        self.assertTrue(math.isnan(choice.logprobs[0].logprob))
        self.assertTrue(all(item.logprob <= 0 for item in choice.logprobs[1:]))

    def test_stop(self):
        whole = generate(temperature=0).choices[0].text
        words = whole.split(" ")
        stop = " ".join(words[len(words) // 2:len(words) // 2 + 2])
        choice = generate(temperature=0, stop=[stop]).choices[0]
        self.assertEqual(choice.text, whole[:whole.index(stop)])
        self.assertEqual((choice.finish_reason, choice.matched_stop), (pb.FINISH_REASON_STOP, stop))
        included = generate(temperature=0, stop=[stop], include_stop_in_output=True).choices[0]
        self.assertEqual(included.text, whole[:whole.index(stop)] + stop)

    def test_tokenize_and_detokenize(self):
        for sample in ("Hello, world!", "naïve – 東京 🎉", "two\n\n\"lines\""):
            tokenized = stub.Tokenize(pb.TokenizeRequest(text=sample, add_special_tokens=False), timeout=TIMEOUT_S)
            back = stub.Detokenize(pb.DetokenizeRequest(tokens=tokenized.tokens), timeout=TIMEOUT_S)
            self.assertEqual(back.text, sample)

    def test_models_and_info(self):
        (model,) = stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S).models
        self.assertEqual((model.id, model.max_context_tokens, model.vocab_size), (MODEL, POSITIONS, VOCABULARY))
        info = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=TIMEOUT_S)
        self.assertTrue(info.ready)
        self.assertTrue(info.version and info.device)
        self.assertGreater(info.kv_blocks_total, 0)

    def test_request_id_comes_back(self):
        call = stub.GenerateStream(request(), timeout=TIMEOUT_S, metadata=[("x-request-id", "mine-7")])
        self.assertEqual(dict(call.initial_metadata())["x-request-id"], "mine-7")
        list(call)


class Errors(unittest.TestCase):
    def assert_code(self, code, call, says=""):
        with self.assertRaises(grpc.RpcError) as caught:
            call()
        self.assertEqual(caught.exception.code(), code, caught.exception.details())
        self.assertIn(says, caught.exception.details())
        return caught.exception

    def test_invalid_arguments_name_the_field(self):
        bad = {"temperature": -1, "top_p": 0, "n": 0, "presence_penalty": 9, "max_tokens": -1, "logprobs": 1000}
        for field, value in bad.items():
            with self.subTest(field=field):
                self.assert_code(grpc.StatusCode.INVALID_ARGUMENT, lambda: generate(**{field: value}), field)
                self.assert_code(grpc.StatusCode.INVALID_ARGUMENT, lambda: list(
                    stub.GenerateStream(request(**{field: value}), timeout=TIMEOUT_S)), field)

    def test_no_input_unknown_model_too_long(self):
        empty = pb.GenerateRequest(sampling=sampling())
        self.assert_code(grpc.StatusCode.INVALID_ARGUMENT, lambda: stub.Generate(empty, timeout=TIMEOUT_S))
        unknown = pb.GenerateRequest(model="gpt-17", prompt="x", sampling=sampling())
        self.assert_code(grpc.StatusCode.NOT_FOUND, lambda: stub.Generate(unknown, timeout=TIMEOUT_S), "gpt-17")
        self.assert_code(grpc.StatusCode.INVALID_ARGUMENT, lambda: generate("word " * 2 * POSITIONS), str(POSITIONS))
        bad_ids = pb.DetokenizeRequest(tokens=[10 ** 6])
        self.assert_code(grpc.StatusCode.INVALID_ARGUMENT, lambda: stub.Detokenize(bad_ids, timeout=TIMEOUT_S))

    def test_message_too_large(self):
        big = pb.TokenizeRequest(text="x" * 200000)
        self.assert_code(grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: stub.Tokenize(big, timeout=TIMEOUT_S))

    def test_deadline(self):
        self.assert_code(grpc.StatusCode.DEADLINE_EXCEEDED,
                         lambda: stub.Generate(request(n=16, max_tokens=400), timeout=0.05))
        server.assert_idle()

    def test_api_keys(self):
        with Server(settings=["server.api_keys=[the-key]"]) as locked, \
                grpc.insecure_channel(locked.grpc_target) as locked_channel:
            locked_stub = inference.services.InferenceStub(locked_channel)

            def call(*metadata):
                return locked_stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S, metadata=metadata)
            self.assert_code(grpc.StatusCode.UNAUTHENTICATED, call)
            self.assert_code(grpc.StatusCode.UNAUTHENTICATED, lambda: call(("authorization", "Bearer wrong")))
            self.assertEqual(len(call(("authorization", "Bearer the-key")).models), 1)

    def test_full_queue_says_when_to_retry(self):
        settings = ["scheduler.max_running_requests=1", "scheduler.max_waiting_requests=1",
                    "backend.device=reference"]
        with Server(settings=settings) as small, grpc.insecure_channel(small.grpc_target) as small_channel:
            small_stub = inference.services.InferenceStub(small_channel)
            calls = [small_stub.Generate.future(request(max_tokens=60), timeout=TIMEOUT_S) for _ in range(12)]
            errors = [call.exception(TIMEOUT_S) for call in calls]
            refused = [call for call, error in zip(calls, errors) if error]
            self.assertTrue(refused)
            self.assertLess(len(refused), 12)
            for call in refused:
                self.assertEqual(call.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
                self.assertGreaterEqual(int(dict(call.trailing_metadata())["retry-after-ms"]), 1)
            small.assert_idle()


class Streams(unittest.TestCase):
    def cancelled(self):
        return server.metric("atp_requests_finished_total", reason="cancelled")

    def test_cancel_in_mid_stream(self):
        before = self.cancelled()
        call = stub.GenerateStream(request(n=16, max_tokens=400), timeout=TIMEOUT_S)
        next(call)
        call.cancel()
        with self.assertRaises(grpc.RpcError) as caught:
            list(call)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.CANCELLED)
        server.assert_idle()
        wait_until(lambda: self.cancelled() > before, 10, "a cancelled request in the metrics")

    def test_channel_closed_in_mid_stream(self):
        before = self.cancelled()
        with grpc.insecure_channel(server.grpc_target) as other:
            call = inference.services.InferenceStub(other).GenerateStream(request(n=16, max_tokens=400))
            next(call)
        server.assert_idle()
        wait_until(lambda: self.cancelled() > before, 10, "a cancelled request in the metrics")

    def test_64_at_once(self):
        def one(i):
            if i % 2:
                return texts(stub.GenerateStream(request(seed=i % 8), timeout=TIMEOUT_S))[0]
            return generate(seed=i % 8).choices[0].text
        expected = [generate(seed=i).choices[0].text for i in range(8)]
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            self.assertEqual(list(pool.map(one, range(64))), [expected[i % 8] for i in range(64)])
        server.assert_idle()

    def test_500_streams_without_a_thread_each(self):
        async def one(many, i):
            parts = []
            async for message in many.GenerateStream(request(f"Chapter {i}", max_tokens=6), timeout=300):
                parts.append(message)
            return parts

        async def all_of_them():
            threads = []

            async def watch():
                while True:
                    threads.append(server.threads())
                    await asyncio.sleep(0.05)
            async with grpc.aio.insecure_channel(server.grpc_target) as many_channel:
                many = inference.services.InferenceStub(many_channel)
                watcher = asyncio.create_task(watch())
                answers = await asyncio.gather(*(one(many, i) for i in range(500)))
                watcher.cancel()
                return answers, max(threads)
        answers, threads = asyncio.run(all_of_them())
        for messages in answers:
            self.assertEqual(messages[-1].usage.completion_tokens, 6)
        self.assertLess(threads, 250)
        server.assert_idle()

    def test_a_client_that_reads_nothing_holds_nobody_up(self):
        release = threading.Event()

        def idle_reader():
            call = stub.GenerateStream(request(n=8, max_tokens=300), timeout=TIMEOUT_S)
            next(call)
            release.wait(TIMEOUT_S)
            call.cancel()
        reader = threading.Thread(target=idle_reader)
        reader.start()
        try:
            self.assertEqual(generate().usage.completion_tokens, 20)
        finally:
            release.set()
            reader.join(TIMEOUT_S)
        server.assert_idle()


class Standards(unittest.TestCase):
    def test_health(self):
        health_stub = health.services.HealthStub(channel)
        pb_health = health.messages
        for service in ("", "atp.v1.Inference"):
            answer = health_stub.Check(pb_health.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
            self.assertEqual(answer.status, pb_health.HealthCheckResponse.SERVING)
        with self.assertRaises(grpc.RpcError) as caught:
            health_stub.Check(pb_health.HealthCheckRequest(service="no.such"), timeout=TIMEOUT_S)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)

    def test_reflection(self):
        reflection_stub = reflection.services.ServerReflectionStub(channel)
        ask = reflection.messages.ServerReflectionRequest
        requests = [ask(list_services=""), ask(file_containing_symbol="atp.v1.Inference")]
        listed, file = reflection_stub.ServerReflectionInfo(iter(requests), timeout=TIMEOUT_S)
        names = {service.name for service in listed.list_services_response.service}
        self.assertLessEqual({"atp.v1.Inference", "grpc.health.v1.Health"}, names)
        self.assertIn(b"GenerateStream", file.file_descriptor_response.file_descriptor_proto[0])


if __name__ == "__main__":
    unittest.main(verbosity=2)
