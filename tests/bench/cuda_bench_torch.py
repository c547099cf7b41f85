"""What PyTorch reaches on the shapes of cuda_bench: scaled_dot_product_attention with each of its kernels, a matrix
product and a copy. JSON, to be read beside cuda_bench's.

  python3 tests/bench/cuda_bench_torch.py [decode] [prefill] [ceilings]
"""

import json
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KV_HEADS, DIM = 32, 8, 128
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
REPLAYS = 21


def median_us(body):
    """Of replays of a CUDA graph, where the body can be captured; of plain calls where it cannot."""
    for _ in range(3):
        body()
    torch.cuda.synchronize()
    run = body
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            body()
        run = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
    times = []
    for i in range(REPLAYS + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times)


def attention(rows, op, batch, queries, context, causal):
    try:
        q = torch.randn(batch, HEADS, queries, DIM, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(batch, KV_HEADS, context, DIM, device="cuda", dtype=torch.bfloat16)
        v = torch.randn_like(k)
    except torch.OutOfMemoryError:
        rows.append({"op": op, "batch": batch, "context": context, "skipped": "out of memory"})
        return
    for name, backend in BACKENDS.items():
        if name == "math" and queries > 1:
            continue  # it writes the whole matrix of scores
        row = {"op": op, "kernel": name, "batch": batch, "context": context}
        try:
            with sdpa_kernel(backend):
                us = median_us(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True))
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row["skipped"] = str(error).splitlines()[0]
        else:
            row["us"] = round(us, 1)
            if queries == 1:
                row["gb_per_s"] = round(2 * k.numel() * k.element_size() / us * 1e-3)
            else:
                row["tflops"] = round(2 * 2 * HEADS * DIM * 0.5 * context * (context + 1) / us * 1e-6, 1)
        rows.append(row)


def ceilings(rows):
    size = 2 << 30
    source = torch.randint(0, 255, (size,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    rows.append({"op": "copy", "gb_per_s": round(2 * size / median_us(lambda: target.copy_(source)) * 1e-3)})
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rows.append({"op": "matmul bf16 8192", "tflops": round(2 * 8192**3 / median_us(lambda: a @ b) * 1e-6, 1)})


def main():
    wanted = sys.argv[1:] or ["decode", "prefill", "ceilings"]
    rows = []
    if "ceilings" in wanted:
        ceilings(rows)
    if "decode" in wanted:
        for context in (4096, 32768, 131072):
            for batch in (1, 16, 64):
                attention(rows, "decode", batch, 1, context, False)
    if "prefill" in wanted:
        for context in (8192, 32768):
            attention(rows, "prefill", 1, context, context, True)
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
