"""Runs the atp binary under test."""

import json
import os
import subprocess
import sys

ROOT = os.path.abspath(os.environ.get("ATP_SOURCE_DIR", os.path.join(os.path.dirname(__file__), "..", "..")))
BINARY = os.environ.get("ATP_BINARY", os.path.join(ROOT, "build", "cpu-release", "atp"))
MODEL = os.path.join(ROOT, "models", "default")
SHARED = os.path.join(ROOT, "..", "shared", "data")

with open(os.path.join(MODEL, "config.json"), encoding="utf-8") as config:
    CONFIG = json.load(config)  # of the default model
POSITIONS = CONFIG["max_position_embeddings"]
LAYERS, KV_HEADS = CONFIG["num_hidden_layers"], CONFIG["num_key_value_heads"]
BLOCK_BYTES = 16 * CONFIG["head_dim"] * 2 * 2  # 16 tokens' keys and values in bf16, of one kv head of one layer

if not os.path.exists(BINARY):
    sys.exit(f"{BINARY} does not exist: build it, or set ATP_BINARY")


def atp(*args, stdin="", timeout_s=300):
    """The finished process, with stdout and stderr as text. Exit codes below 0 are crashes and always fail."""
    done = subprocess.run([BINARY, *map(str, args)], input=stdin.encode(), capture_output=True, timeout=timeout_s,
                          cwd=ROOT)
    done.stdout, done.stderr = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    assert done.returncode in (0, 1, 2), f"{args}: exit code {done.returncode}\n{done.stderr}"
    return done


def skip(reason):
    """Ends the test program as skipped, as CTest's SKIP_RETURN_CODE has it."""
    print(f"SKIPPED: {reason}", file=sys.stderr, flush=True)
    sys.exit(77)
