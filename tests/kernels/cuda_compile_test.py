"""nvcc compiles every .cu file for every GPU that we ship code for, warnings being errors, and what ptxas says of
each kernel is what is recorded: no spills, no stack frame, and no more registers than cuda_registers.json has.

  cuda_compile_test.py --record   writes cuda_registers.json anew
Exit code 77, a skip, where there is no nvcc.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECORD = pathlib.Path(__file__).with_name("cuda_registers.json")

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def find_nvcc():
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def flags():
    text = (ROOT / "cmake/cuda.cmake").read_text()
    return re.search(r"set\(ATP_CUDA_FLAGS\s+([^)]*)\)", text).group(1).split()


def kernel_name(mangled):
    """atp::cuda::(anonymous namespace)::Name<arguments>(…), as Name<arguments>."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)|_GLOBAL__N_\w+|\([\w:]+\)(?=-?\d)", "", name)  # and casts of arguments
    name = re.sub(r"^void ", "", name.split("(")[0])
    return re.sub(r"(\w*::)+", "", name)


def parse(log):
    """{kernel: {gpu: (registers, frame, spilled bytes)}}"""
    found, kernel, gpu, frame, spilled = {}, None, None, 0, 0
    for line in log.splitlines():
        if match := ENTRY.search(line):
            kernel, gpu = kernel_name(match.group(1)), match.group(2)
        elif match := FRAME.search(line):
            frame, spilled = int(match.group(1)), int(match.group(2)) + int(match.group(3))
        elif (match := REGISTERS.search(line)) and kernel:
            found.setdefault(kernel, {})[gpu] = (int(match.group(1)), frame, spilled)
            kernel = None
    return found


def compile_file(nvcc, source, folder):
    command = [nvcc, "-std=c++20", *flags(), "-Xptxas=-v", f"-I{ROOT}", "-c", str(source),
               "-o", str(pathlib.Path(folder) / (source.name + ".o"))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return source, " ".join(command) + "\n" + done.stdout + done.stderr, None
    return source, None, parse(done.stdout + done.stderr)


def version_of(nvcc):
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\S+),", text).group(1)


def main():
    nvcc = find_nvcc()
    if nvcc is None:
        print("skipped: no nvcc on PATH or in /usr/local/cuda/bin")
        return 77
    sources = sorted((ROOT / "kernels/cuda").glob("*.cu"))
    errors, measured = [], {}
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, error, kernels in pool.map(lambda s: compile_file(nvcc, s, folder), sources):
            if error:
                errors.append(error)
                continue
            for kernel, gpus in kernels.items():
                measured[f"{source.name} {kernel}"] = gpus
    if not measured and not errors:
        errors.append("nvcc reported no kernel at all")
    version = version_of(nvcc)
    if "--record" in sys.argv and not errors:
        registers = {k: {gpu: r[0] for gpu, r in sorted(g.items())} for k, g in sorted(measured.items())}
        RECORD.write_text(json.dumps({"nvcc": version, "registers": registers}, indent=1) + "\n")
    record = json.loads(RECORD.read_text())
    for kernel, gpus in measured.items():
        for gpu, (registers, frame, spilled) in gpus.items():
            if spilled or frame:
                errors.append(f"{kernel} on {gpu}: {spilled} bytes spilled, a stack frame of {frame} bytes")
            if version != record["nvcc"]:
                continue  # another compiler allocates otherwise; spills are what matters
            recorded = record["registers"].get(kernel, {}).get(gpu)
            if recorded is None or registers > recorded:
                errors.append(f"{kernel} on {gpu}: {registers} registers, recorded {recorded}; if that is meant, --record")
        print(f"{kernel:60}", {gpu: r[0] for gpu, r in sorted(gpus.items())})
    for kernel in set(record["registers"]) - set(measured):
        errors.append(f"{kernel} is recorded and no longer there; --record")
    print("\n".join(errors))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
