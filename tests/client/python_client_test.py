"""The Python client against a servicer in this process: what it sends, what it makes of answers, errors and cancels."""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import unittest
from concurrent import futures

sys.path.insert(0, os.path.join(os.environ["ATP_SOURCE_DIR"], "client", "python"))
sys.path.insert(0, os.path.join(os.environ["ATP_BUILD_DIR"], "python"))

try:
    import grpc
except ImportError:
    print("SKIPPED: python3-grpcio is not installed (make deps installs it)")
    sys.exit(77)

from atp.v1 import inference_pb2 as pb
from atp.v1 import inference_pb2_grpc as pb_grpc
from atp_client import AtpError, Client


class Servicer(pb_grpc.InferenceServicer):
    def __init__(self):
        self.request = None
        self.metadata = {}
        self.stream_ended = threading.Event()

    def _note(self, request, context):
        self.request = request
        self.metadata = dict(context.invocation_metadata())

    def Generate(self, request, context):
        self._note(request, context)
        if request.prompt == "full":
            context.set_trailing_metadata((("retry-after-ms", "1500"),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        return pb.GenerateResponse(request_id="id", model="tiny", usage=pb.Usage(prompt_tokens=1, completion_tokens=2,
                                                  atp=pb.CompressionUsage(preset="compact", kv_bytes=7)),
                                   choices=[pb.Choice(text="ab", finish_reason=pb.FINISH_REASON_LENGTH)])

    def GenerateStream(self, request, context):
        self._note(request, context)
        if request.prompt == "bad":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "temperature: no")
        context.add_callback(self.stream_ended.set)
        count = request.sampling.max_tokens
        for i in range(count):
            if not context.is_active():
                return
            last = pb.Usage(completion_tokens=count, atp=pb.CompressionUsage(preset="compact", kv_bytes=9))
            yield pb.GenerateStreamResponse(choice=pb.Choice(text=chr(97 + i % 26)),
                                            usage=last if i == count - 1 else None)

    def Tokenize(self, request, context):
        self._note(request, context)
        return pb.TokenizeResponse(tokens=[1, 2])

    def Detokenize(self, request, context):
        return pb.DetokenizeResponse(text=str(list(request.tokens)))

    def ListModels(self, request, context):
        return pb.ListModelsResponse(models=[pb.ModelInfo(id="tiny")])

    def GetServerInfo(self, request, context):
        return pb.GetServerInfoResponse(version="1", ready=True)


class PythonClientTest(unittest.TestCase):
    def setUp(self):
        self.servicer = Servicer()
        self.server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
        pb_grpc.add_InferenceServicer_to_server(self.servicer, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.client = Client(f"127.0.0.1:{port}", api_key="secret")

    def tearDown(self):
        self.client.close()
        self.server.stop(None).wait()

    def test_generate(self):
        answer = self.client.generate("hi", max_tokens=2, temperature=0, seed=None, stop=["x"], logit_bias={3: 1.5},
                                      priority=4, request_id="mine", timeout=60)
        self.assertEqual(answer.text, "ab")
        self.assertEqual(answer.usage.completion_tokens, 2)
        self.assertEqual((answer.atp.preset, answer.atp.kv_bytes), ("compact", 7))
        sent = self.servicer.request
        self.assertEqual((sent.prompt, sent.priority, sent.sampling.max_tokens), ("hi", 4, 2))
        self.assertTrue(sent.sampling.HasField("temperature"))  # zero, but given
        self.assertFalse(sent.sampling.HasField("seed"))
        self.assertEqual(dict(sent.sampling.logit_bias), {3: 1.5})
        self.assertEqual(self.servicer.metadata["authorization"], "Bearer secret")
        self.assertEqual(self.servicer.metadata["x-request-id"], "mine")

    def test_inputs(self):
        self.client.generate([5, 6])
        self.assertEqual(list(self.servicer.request.prompt_tokens.ids), [5, 6])
        self.client.generate([])
        self.assertEqual(self.servicer.request.WhichOneof("input"), "prompt_tokens")
        self.client.generate([{"role": "user", "content": "hello"}])
        self.assertEqual(self.servicer.request.chat.messages[0].content, "hello")
        with self.assertRaisesRegex(TypeError, "bytes"):
            self.client.generate(b"hello")
        self.client.generate("hi", stop="END")
        self.assertEqual(list(self.servicer.request.sampling.stop), ["END"])

    def test_compression(self):
        self.client.generate("hi")
        self.assertFalse(self.servicer.request.HasField("atp"))
        self.client.generate("hi", atp={"ratio": 0.25, "bits": 4})
        self.assertEqual((self.servicer.request.atp.ratio, self.servicer.request.atp.bits), (0.25, 4))
        list(self.client.stream("hi", max_tokens=1, atp={"preset": "compact"}))
        self.assertEqual(self.servicer.request.atp.WhichOneof("budget"), "preset")
        self.assertEqual(self.servicer.request.atp.preset, "compact")
        with self.assertRaises(ValueError):
            self.client.generate("hi", atp={"ration": 0.5})

    def test_unknown_parameter(self):
        with self.assertRaisesRegex(TypeError, "max_new_tokens"):
            self.client.generate("hi", max_new_tokens=3)

    def test_stream(self):
        stream = self.client.stream("hi", max_tokens=5)
        self.assertIsNone(stream.usage)
        self.assertEqual("".join(stream.text()), "abcde")
        self.assertEqual((stream.usage.completion_tokens, stream.usage.atp.kv_bytes), (5, 9))

    def test_leaving_a_stream_cancels_it(self):
        with self.client.stream("hi", max_tokens=1 << 30) as stream:
            self.assertEqual(next(stream.text()), "a")
        self.assertTrue(self.servicer.stream_ended.wait(60))

    def test_errors(self):
        with self.assertRaises(AtpError) as caught:
            self.client.generate("full")
        self.assertEqual(caught.exception.code, grpc.StatusCode.RESOURCE_EXHAUSTED)
        self.assertEqual(caught.exception.retry_after, 1.5)
        copy = pickle.loads(pickle.dumps(caught.exception))  # as it comes out of another process
        self.assertEqual((type(copy), copy.code, copy.message, copy.retry_after, str(copy)),
                         (AtpError, grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", 1.5, str(caught.exception)))
        with self.assertRaises(AtpError) as caught:
            list(self.client.stream("bad"))
        self.assertEqual(caught.exception.code, grpc.StatusCode.INVALID_ARGUMENT)
        self.assertEqual(caught.exception.message, "temperature: no")
        self.assertIsNone(caught.exception.retry_after)

    def test_small_calls(self):
        self.assertEqual(self.client.tokenize("x", add_special_tokens=False), [1, 2])
        self.assertFalse(self.servicer.request.add_special_tokens)
        self.assertEqual(self.client.detokenize([7]), "[7]")
        self.assertEqual(self.client.models()[0].id, "tiny")
        self.assertTrue(self.client.info(timeout=60).ready)

    @unittest.skipUnless(shutil.which("openssl"), "no openssl to make a certificate with")
    def test_tls(self):
        with tempfile.TemporaryDirectory() as folder:
            key, certificate = os.path.join(folder, "key.pem"), os.path.join(folder, "certificate.pem")
            subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key,
                            "-out", certificate, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
                           check=True, capture_output=True)
            with open(key, "rb") as key_file, open(certificate, "rb") as certificate_file:
                pair = key_file.read(), certificate_file.read()
        server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
        self.addCleanup(lambda: server.stop(None).wait())
        pb_grpc.add_InferenceServicer_to_server(self.servicer, server)
        port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair]))
        server.start()
        with Client(f"localhost:{port}", credentials=grpc.ssl_channel_credentials(pair[1])) as client:
            self.assertEqual(client.generate("hi", timeout=60).text, "ab")
        with Client(f"localhost:{port}") as plain, self.assertRaises(AtpError) as caught:
            plain.info(timeout=60)
        self.assertEqual(caught.exception.code, grpc.StatusCode.UNAVAILABLE)


if __name__ == "__main__":
    unittest.main()
