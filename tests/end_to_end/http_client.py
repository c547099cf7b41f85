"""A plain HTTP client of the OpenAI-style API: what the tests of the REST front end speak."""

import json

import requests

TIMEOUT_S = 120


def post(server, path, body, **kwargs):
    return requests.post(server.url + path, json=body, timeout=TIMEOUT_S, **kwargs)


def call(server, path, body, **kwargs):
    """The answer of a call that must succeed."""
    response = post(server, path, body, **kwargs)
    assert response.status_code == 200, f"{path} {body}: {response.status_code} {response.text}"
    return response.json()


def events(response):
    """The JSON events of an SSE answer, up to [DONE], which must come and must be last."""
    content_type = response.headers.get("content-type", "")
    assert content_type.startswith("text/event-stream"), f"not a stream: {content_type}: {response.text}"
    done = False
    for line in response.iter_lines():
        if not line or line.startswith(b":"):
            continue
        assert line.startswith(b"data: "), f"not an SSE data line: {line!r}"
        assert not done, f"after [DONE]: {line!r}"
        data = line[len(b"data: "):]
        if data == b"[DONE]":
            done = True
        else:
            yield json.loads(data.decode("utf-8"))
    assert done, "the stream ended without [DONE]"


def stream(server, path, body, **kwargs):
    """All events of a streamed call that must succeed."""
    with post(server, path, dict(body, stream=True), stream=True, **kwargs) as response:
        assert response.status_code == 200, f"{path} {body}: {response.status_code} {response.text}"
        return list(events(response))


def completion(server, prompt, **parameters):
    return call(server, "/v1/completions", dict(parameters, model="default", prompt=prompt))


def text(server, prompt, **parameters):
    return completion(server, prompt, **parameters)["choices"][0]["text"]


def chat(server, content, **parameters):
    body = dict(parameters, model="default", messages=[{"role": "user", "content": content}])
    return call(server, "/v1/chat/completions", body)
