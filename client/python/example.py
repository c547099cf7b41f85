"""Streams one answer: example.py [HOST:PORT [PROMPT]]. The key of a protected server comes from ATP_API_KEY."""

import os
import sys

from atp_client import AtpError, Client


def main() -> int:
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"
    prompt = sys.argv[2] if len(sys.argv) > 2 else "Once upon a time"
    with Client(address, api_key=os.environ.get("ATP_API_KEY")) as client:
        try:
            stream = client.stream(prompt, max_tokens=64, timeout=60)
            for piece in stream.text():
                print(piece, end="", flush=True)
            if stream.usage is not None and stream.usage.HasField("atp"):
                atp = stream.usage.atp
                print(f"\ncompression {atp.preset}: {atp.kv_bytes} bytes of KV cache, {atp.exact_kv_bytes} exact",
                      file=sys.stderr)
        except AtpError as error:
            print(f"\nexample.py: {error}", file=sys.stderr)
            return 1
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
