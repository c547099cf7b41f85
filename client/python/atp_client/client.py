"""Client of atp.v1.Inference. Fields and errors are documented in proto/atp/v1/inference.proto."""

import dataclasses
from typing import Dict, Iterator, List, Optional, Sequence, Union

import grpc

try:
    from atp.v1 import inference_pb2 as pb
    from atp.v1 import inference_pb2_grpc as pb_grpc
except ImportError as error:
    raise ImportError(
        "the generated stubs (atp/v1/inference_pb2.py) are not on PYTHONPATH: add <build folder>/python, "
        "or run `make` in client/python"
    ) from error

# Text, token ids, or a conversation: [{"role": "user", "content": "…"}, …].
Prompt = Union[str, Sequence[int], Sequence[Dict[str, str]]]

_SAMPLING_FIELDS = frozenset(field.name for field in pb.SamplingParams.DESCRIPTOR.fields)


class AtpError(Exception):
    """A call that failed.

    code: grpc.StatusCode. message: what the server said; begins with the field's name for INVALID_ARGUMENT.
    retry_after: seconds to wait before trying again, where the server said so (RESOURCE_EXHAUSTED), else None.
    """

    def __init__(self, error: grpc.RpcError):
        self.code = error.code()
        self.message = error.details()
        self.retry_after: Optional[float] = None
        for key, value in error.trailing_metadata() or ():
            if key == "retry-after-ms":
                self.retry_after = int(value) / 1000
        super().__init__(f"{self.code.name}: {self.message}")

    def __reduce__(self):  # so that it passes from one process to another
        return _restore_error, (type(self), self.args, self.__dict__.copy())


def _restore_error(kind, args, fields):
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


@dataclasses.dataclass
class Generation:
    """A whole answer. `choices` are protobuf Choice messages (text, tokens, logprobs, finish_reason, …)."""

    request_id: str
    model: str
    choices: List["pb.Choice"]
    usage: "pb.Usage"

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def atp(self) -> Optional["pb.CompressionUsage"]:
        """How its history was compressed, and the bytes of its KV cache."""
        return self.usage.atp if self.usage.HasField("atp") else None


class Stream:
    """An answer piece by piece: iterate over it for GenerateStreamResponse messages.

    `cancel()` ends the call from any thread, and so does leaving a `with` block: the server frees what it held.
    `usage` is None until the last message has come.
    """

    def __init__(self, call):
        self._call = call
        self.usage: Optional["pb.Usage"] = None

    def __iter__(self) -> Iterator["pb.GenerateStreamResponse"]:
        try:
            for message in self._call:
                if message.HasField("usage"):
                    self.usage = message.usage
                yield message
        except grpc.RpcError as error:
            raise AtpError(error) from None

    def text(self) -> Iterator[str]:
        """Only the pieces of text, of all choices."""
        for message in self:
            if message.choice.text:
                yield message.choice.text

    def cancel(self) -> None:
        self._call.cancel()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception) -> None:
        self.cancel()


class Client:
    """Thread-safe. `with Client() as client:` closes the connection at the end.

    credentials: for a server behind a TLS proxy, as grpc.ssl_channel_credentials(); None: unencrypted, api_key too.
    options: more of gRPC's channel arguments, as [("grpc.lb_policy_name", "round_robin")].
    `timeout` of a call is in seconds; without one it may take for ever, but not on a connection that is dead.
    """

    def __init__(self, address: str = "127.0.0.1:8001", api_key: Optional[str] = None,
                 credentials: Optional[grpc.ChannelCredentials] = None, options: Sequence[tuple] = ()):
        # A long answer with log probabilities passes gRPC's default limit of 4 MiB; a server that vanished without a
        # word is noticed within 40 seconds.
        arguments = [("grpc.max_receive_message_length", -1), ("grpc.keepalive_time_ms", 30_000),
                     ("grpc.keepalive_timeout_ms", 10_000), *options]
        self._channel = (grpc.insecure_channel(address, arguments) if credentials is None
                         else grpc.secure_channel(address, credentials, arguments))
        self._stub = pb_grpc.InferenceStub(self._channel)
        self._metadata = [("authorization", f"Bearer {api_key}")] if api_key else []

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def generate(self, prompt: Prompt, *, model: str = "", priority: int = 0, atp: Optional[Dict] = None,
                 timeout: Optional[float] = None, request_id: Optional[str] = None, **sampling) -> Generation:
        """One answer, when it is whole. `sampling`: fields of SamplingParams (max_tokens=…, temperature=…). `atp`:
        how far its history is compressed, instead of as the server does it: {"preset": "compact"} or
        {"ratio": 0.25, "bits": 4}."""
        request = _request(prompt, model, priority, atp, sampling)
        response = self._call(self._stub.Generate, request, timeout, request_id)
        return Generation(response.request_id, response.model, list(response.choices), response.usage)

    def stream(self, prompt: Prompt, *, model: str = "", priority: int = 0, atp: Optional[Dict] = None,
               timeout: Optional[float] = None, request_id: Optional[str] = None, **sampling) -> Stream:
        """The same piece by piece. `timeout` (seconds) becomes the call's deadline."""
        request = _request(prompt, model, priority, atp, sampling)
        return Stream(self._stub.GenerateStream(request, timeout=timeout, metadata=self._with_id(request_id)))

    def tokenize(self, text: str, add_special_tokens: bool = True, *, timeout: Optional[float] = None) -> List[int]:
        request = pb.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list(self._call(self._stub.Tokenize, request, timeout).tokens)

    def detokenize(self, tokens: Sequence[int], *, timeout: Optional[float] = None) -> str:
        return self._call(self._stub.Detokenize, pb.DetokenizeRequest(tokens=tokens), timeout).text

    def models(self, *, timeout: Optional[float] = None) -> List["pb.ModelInfo"]:
        return list(self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout).models)

    def info(self, *, timeout: Optional[float] = None) -> "pb.GetServerInfoResponse":
        return self._call(self._stub.GetServerInfo, pb.GetServerInfoRequest(), timeout)

    def _with_id(self, request_id: Optional[str]):
        return self._metadata + ([("x-request-id", request_id)] if request_id else [])

    def _call(self, method, request, timeout: Optional[float] = None, request_id: Optional[str] = None):
        try:
            return method(request, timeout=timeout, metadata=self._with_id(request_id))
        except grpc.RpcError as error:
            raise AtpError(error) from None


def _request(prompt: Prompt, model: str, priority: int, atp: Optional[Dict], sampling) -> "pb.GenerateRequest":
    unknown = sorted(set(sampling) - _SAMPLING_FIELDS)
    if unknown:
        raise TypeError(f"unknown sampling parameter {unknown[0]!r}; known: {', '.join(sorted(_SAMPLING_FIELDS))}")
    given = {name: value for name, value in sampling.items() if value is not None}
    if isinstance(given.get("stop"), str):  # one, as in OpenAI's API; and not each of its letters
        given["stop"] = [given["stop"]]
    request = pb.GenerateRequest(model=model, priority=priority, sampling=pb.SamplingParams(**given))
    if atp is not None:
        request.atp.CopyFrom(pb.Compression(**atp))
    if isinstance(prompt, str):
        request.prompt = prompt
        return request
    if isinstance(prompt, (bytes, bytearray)):  # a sequence of numbers, too
        raise TypeError("prompt: bytes; give a str, token ids or messages")
    items = list(prompt)
    if items and isinstance(items[0], dict):
        request.chat.messages.extend(pb.ChatMessage(**message) for message in items)
    else:
        request.prompt_tokens.ids.extend(items)
        request.prompt_tokens.SetInParent()
    return request
