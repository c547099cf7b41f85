"""Streams one answer: example.py [HOST:PORT [PROMPT]]. The key of a protected server comes from ATP_API_KEY."""

import os
import sys

from atp_client import AtpError, Client


def main() -> int:
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"
    prompt = sys.argv[2] if len(sys.argv) > 2 else "Once upon a time"
    with Client(address, api_key=os.environ.get("ATP_API_KEY")) as client:
        try:
            for piece in client.stream(prompt, max_tokens=64, timeout=60).text():
                print(piece, end="", flush=True)
        except AtpError as error:
            print(f"\nexample.py: {error}", file=sys.stderr)
            return 1
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
