#!/usr/bin/env python3
"""atp and llama.cpp side by side: same machine, same weights, same threads, the two by turns, medians of several rounds.

    compare_llama_cpp.py --atp build/cpu-release/atp --llama-bin LLAMA_CPP/build/bin --models DIR --json FILE

DIR is what `random_model.py random SHAPE DIR` wrote. The quantised files that are missing in it are made first, by
llama-quantize (Q8_0, Q4_0, Q4_K) and atp quantize (q4), all matrices alike; q8 and Q8_0 are the same bytes. Rows, each a
pair of numbers and their ratio (above 1: atp is better):

    decode        tokens/s of one sequence behind a short prompt
    prefill       tokens/s of prompts of 512 and 2048 tokens
    start         seconds from exec to the first token of a served answer, with the file in the page cache
    peak_rss      bytes, of that same server after the answer
    serve         1, 8 and 32 users at once, 256 tokens in and 128 out: tokens/s in total, and the 95th percentile of the
                  time to first token in seconds
    long          one user with --long-prompt tokens in: tokens/s of the answer from its first token on, exact and
                  (row "ratio 0.25") with a quarter of the cache entries on atp's side; seconds to the first token

A row ends after --rounds rounds, or after the first one that ends past --row-seconds; "rounds" of a row says how many
there were. A side that crashes ends its row, which then says "failed". The file is written anew after every row. About twelve minutes on two cores, at TinyLlama's shape:

    compare_llama_cpp.py … --row-seconds 30 --serve-pairs q8/Q8_0 --waves 1 --atp-flags --set model.activation_dtype=bf16

Both servers get the same number of threads, slots and positions. Needs Python's standard library only.
"""

import argparse
import concurrent.futures
import http.client
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time

PAIRS = {  # name: (atp's file, llama.cpp's file)
    "q8/Q8_0": ("model-q8_0.gguf", "model-q8_0.gguf"),
    "q4/Q4_0": ("model-q4.gguf", "model-q4_0.gguf"),
    "q4/Q4_K": ("model-q4.gguf", "model-q4_k.gguf"),
    "Q4_0/Q4_0": ("model-q4_0.gguf", "model-q4_0.gguf"),
    "Q4_K/Q4_K": ("model-q4_k.gguf", "model-q4_k.gguf"),
    "bf16/BF16": ("model-bf16.gguf", "model-bf16.gguf"),
}
QUANTISED = {"model-q8_0.gguf": "Q8_0", "model-q4_0.gguf": "Q4_0", "model-q4_k.gguf": "Q4_K_S"}
TESTS = ["decode", "prefill", "start", "serve", "long"]
POSITIONS = 512  # of a served request: 256 in, 128 out, and room


class Failed(Exception):
    """A process of either side did not do what it was asked for."""


def output_of(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def version_of(llama):
    """Its version and build lines, which it prints as errors."""
    said = subprocess.run([llama, "--version"], capture_output=True, text=True)
    return " ".join(line for line in (said.stdout + said.stderr).splitlines() if "version" in line)


def make_missing(args):
    needed = {file for pair in args.pairs for file in PAIRS[pair]}
    for name in sorted(needed):
        path = args.models / name
        if path.exists():
            continue
        if name in QUANTISED:
            output_of([args.llama_bin / "llama-quantize", "--pure", args.models / "model-bf16.gguf", path,
                       QUANTISED[name], args.threads])
        elif name == "model-q4.gguf":
            output_of([args.atp, "quantize", args.models / "model-bf16.gguf", path, "--weight-dtype", "q4"])


# --- one process, one number ------------------------------------------------------------------------------------------


def atp_rate(args, pair, phase, tokens):
    counts = ["--context", tokens] if phase == "prefill" else ["--context", 8, "--tokens", tokens]
    command = [args.atp, "bench", phase, "--model", args.models / PAIRS[pair][0], "--threads", args.threads, "--batch", 1,
               *counts, "--json", *args.atp_flags]
    return json.loads(output_of(command))["rows"][0]["tokens_per_second"]


def llama_rate(args, pair, phase, tokens):
    counts = ["-p", tokens, "-n", 0] if phase == "prefill" else ["-p", 0, "-n", tokens]
    command = [args.llama_bin / "llama-bench", "-m", args.models / PAIRS[pair][1], "-t", args.threads, "-r", 1,
               "-o", "json", *counts]
    return json.loads(output_of(command))[0]["avg_ts"]


# --- servers ---------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A server on a port of its own, from exec to SIGTERM."""

    def __init__(self, args, side, pair, users, positions=POSITIONS, flags=()):
        self.side = side
        self.port = free_port()
        model, gguf = PAIRS[pair]
        if side == "atp":
            command = [args.atp, "serve", "--model", args.models / model, "--threads", args.threads, "--http-port",
                       self.port, "--grpc-port", 0, "--metrics-port", 0, "--set",
                       f"scheduler.max_running_requests={users}", "--set", "kv_cache.prefix_cache=false", "--set", "model.name=model", "--set",
                       f"kv_cache.memory_bytes={args.kv_bytes * users * positions // POSITIONS}", *flags,
                       *args.atp_flags]
        else:
            command = [args.llama_bin / "llama-server", "-m", args.models / gguf, "-t", args.threads, "--host", "127.0.0.1",
                       "--port", self.port, "-np", users, "-c", positions * users, "--no-webui"]
        self.started = time.monotonic()
        self.process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)

    def wait(self):
        while True:
            if self.process.poll() is not None:
                raise Failed(f"a server ended with exit code {self.process.returncode}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.01)

    def answer(self, prompt, tokens):
        """Streams an answer; (seconds to the first token, to the last, tokens)."""
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3600)
        body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
                "ignore_eos": True, "stream_options": {"include_usage": True}}
        if self.side == "llama_cpp":
            body["cache_prompt"] = False  # prompts differ; nothing may be found
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise Failed(f"status {response.status}: {response.read(500)}")
        first, counted = None, 0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if first is None and chunk.get("choices"):
                first = time.monotonic() - began
            if chunk.get("usage"):
                counted = chunk["usage"]["completion_tokens"]
        return first, time.monotonic() - began, counted or tokens

    def peak_rss_bytes(self):
        for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0


def prompt_of(index, tokens=256):
    """Token ids, another prompt for each user."""
    return [3 + 256 + (index * 31 + i * 7) % 200 for i in range(tokens)]


def start_up(args, side, pair):
    with Server(args, side, pair, 1) as server:
        server.wait()
        server.answer(prompt_of(0, 8), 1)
        return {"start_s": time.monotonic() - server.started, "peak_rss_bytes": server.peak_rss_bytes()}


def serve(args, side, pair, users):
    with Server(args, side, pair, users) as server:
        server.wait()
        server.answer(prompt_of(99, 32), 4)
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(users) as pool:
            answers = list(pool.map(lambda i: server.answer(prompt_of(i, args.prompt_tokens), args.answer_tokens),
                                    range(users * args.waves)))
        seconds = time.monotonic() - began
        firsts = sorted(first for first, _, _ in answers)
        return {"tokens_per_second": sum(count for _, _, count in answers) / seconds,
                "ttft_p95_s": firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))],
                "peak_rss_bytes": server.peak_rss_bytes()}


def long_context(args, side, pair, flags):
    with Server(args, side, pair, 1, positions=args.long_prompt + 256, flags=flags) as server:
        server.wait()
        first, last, count = server.answer(prompt_of(0, args.long_prompt), args.long_tokens)
        return {"tokens_per_second": (count - 1) / (last - first), "ttft_s": first,
                "peak_rss_bytes": server.peak_rss_bytes()}


# --- by turns --------------------------------------------------------------------------------------------------------


def compared(args, labels, measure, better):
    """Both sides by turns; {"atp": {…}, "llama_cpp": {…}, "ratio": {…}} of medians. better: +1 more is better, -1 less."""
    samples = {"atp": [], "llama_cpp": []}
    began = time.monotonic()
    for round_number in range(args.rounds):
        if round_number > 0 and args.row_seconds and time.monotonic() - began > args.row_seconds:
            break
        order = list(samples) if round_number % 2 == 0 else list(samples)[::-1]  # nobody is always first
        for side in order:
            try:
                samples[side].append(measure(side))
            except (Failed, OSError, http.client.HTTPException) as error:
                return {**labels, "failed": side, "error": str(error)}
    row = dict(labels)
    for side, values in samples.items():
        row[side] = {key: statistics.median(value[key] for value in values) for key in values[0]}
    row["ratio"] = {key: (row["atp"][key] / row["llama_cpp"][key]) ** better[key] for key in row["atp"]}
    row["rounds"] = len(samples["atp"])
    return row


def rate_row(args, pair, phase, tokens):
    def measure(side):
        return {"tokens_per_second": (atp_rate if side == "atp" else llama_rate)(args, pair, phase, tokens)}

    return compared(args, {"test": phase, "pair": pair, "tokens": tokens}, measure, {"tokens_per_second": 1})


def rows_of(args):
    for pair in args.pairs:
        if "decode" in args.tests:
            yield rate_row(args, pair, "decode", args.decode_tokens)
        for tokens in args.prefill_tokens if "prefill" in args.tests else []:
            yield rate_row(args, pair, "prefill", tokens)
        if "start" in args.tests:
            yield compared(args, {"test": "start", "pair": pair}, lambda side: start_up(args, side, pair),
                           {"start_s": -1, "peak_rss_bytes": -1})
        for users in args.users if "serve" in args.tests and pair in (args.serve_pairs or args.pairs) else []:
            yield compared(args, {"test": "serve", "pair": pair, "users": users},
                           lambda side: serve(args, side, pair, users),
                           {"tokens_per_second": 1, "ttft_p95_s": -1, "peak_rss_bytes": -1})
        if "long" in args.tests and pair in (args.serve_pairs or args.pairs):
            yield from long_rows(args, pair)


def long_rows(args, pair):
    for name, flags in (("exact", ()), ("ratio 0.25", ("--set", "atp.ratio=0.25"))):
        yield compared(args, {"test": "long", "pair": pair, "prompt": args.long_prompt, "atp_entries": name},
                       lambda side, flags=flags: long_context(args, side, pair, flags),
                       {"tokens_per_second": 1, "ttft_s": -1, "peak_rss_bytes": -1})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atp", type=pathlib.Path, required=True, help="the binary")
    parser.add_argument("--llama-bin", type=pathlib.Path, required=True, help="folder of llama-bench, llama-server, llama-quantize")
    parser.add_argument("--models", type=pathlib.Path, required=True, help="what random_model.py wrote")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--row-seconds", type=float, default=0, help="no further round of a row after so long; 0: all")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--serve-pairs", nargs="+", choices=PAIRS, help="of --pairs, for serve and long; default: all")
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=TESTS[:4])
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--prefill-tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--waves", type=int, default=2, help="requests per user, one after the other")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--long-prompt", type=int, default=8064)
    parser.add_argument("--long-tokens", type=int, default=64)
    parser.add_argument("--kv-bytes", type=int, default=32 << 20, help="atp's cache per user and 512 positions")
    parser.add_argument("--atp-flags", nargs=argparse.REMAINDER, default=[], help="the rest goes to atp")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    args = parser.parse_args()
    try:
        make_missing(args)
    except Failed as error:
        sys.exit(str(error))
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    flags = [pathlib.Path(part).name if part.startswith("/") else part for part in sys.argv[1:]]
    report = {"command": " ".join(["compare_llama_cpp.py", *flags]), "date": time.strftime("%Y-%m-%d"), "cpu": cpu,
              "threads": args.threads, "atp": output_of([args.atp, "--version"]).strip(),
              "llama_cpp": version_of(args.llama_bin / "llama-server"), "rows": []}
    for row in rows_of(args):
        print(json.dumps(row), file=sys.stderr, flush=True)
        report["rows"].append(row)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
