#!/usr/bin/env python3
"""Fails on any include against the arrows: cli -> server -> engine -> kernels; config and proto are leaves.

Third-party headers that shape a layer (gRPC, protobuf, JSON, Boost, CUDA, ...) are allowed in few places only, and so
are cycles between files nowhere.
"""
import os
import re
import sys

ROOT = os.environ.get("ATP_SOURCE_DIR") or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDERS = ("config", "kernels", "engine", "proto", "server", "client", "cli")
SUFFIXES = (".h", ".cc", ".cu", ".cuh", ".inc")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]', re.MULTILINE)

# folder -> folders that its files may include, besides itself.
ALLOWED = {
    "config": set(),
    "proto": set(),
    "kernels": set(),
    "engine": {"kernels"},
    "server": {"engine", "kernels", "config", "proto"},
    "client": {"proto"},
    "cli": {"server", "engine", "kernels", "config"},
}

# What a third-party header looks like, and the paths that may include it. A rule for `.cc` files keeps it out of headers.
THIRD_PARTY = [
    (re.compile(r"^(grpcpp|grpc|google/protobuf)/|^atp/v1/"), re.compile(r"^(server|client|cli)/")),
    (re.compile(r"^nlohmann/"), re.compile(r"^((server|client|cli)/|engine/.*\.cc$)")),
    (re.compile(r"^boost/"), re.compile(r"^(server|client|cli)/")),
    (re.compile(r"^prometheus/"), re.compile(r"^server/.*\.cc$")),
    (re.compile(r"^openssl/"), re.compile(r"^server/.*\.cc$")),
    (re.compile(r"^CLI/"), re.compile(r"^cli/")),
    (re.compile(r"^yaml-cpp/"), re.compile(r"^config/.*\.cc$")),
    (re.compile(r"^sentencepiece|^pcre2"), re.compile(r"^engine/.*\.cc$")),
    (re.compile(r"^hwy/"), re.compile(r"^kernels/cpu/")),
    (re.compile(r"^(cuda|cublas|cuda_[a-z0-9_]+|mma|cub/.*|cooperative_groups.*)(\.h|\.hpp|\.cuh)?$"),
     re.compile(r"^kernels/cuda/")),
]


def files():
    for folder in FOLDERS:
        for directory, _, names in os.walk(os.path.join(ROOT, folder)):
            for name in sorted(names):
                if name.endswith(SUFFIXES):
                    yield os.path.relpath(os.path.join(directory, name), ROOT)


def violations(path, text, exists):
    """Every include of `text` that is against the arrows; `exists` tells whether a path is a file of the project."""
    folder = path.split("/")[0]
    for match in INCLUDE.finditer(text):
        quote, header = match.groups()
        where = f"{path}:{text.count(chr(10), 0, match.start(2)) + 1}"
        for pattern, allowed in THIRD_PARTY:
            if pattern.search(header) and not allowed.search(path):
                yield f"{where}: {header} may be included only where the path matches {allowed.pattern}"
        target = header.split("/")[0]
        if target in ALLOWED and exists(header):
            if target != folder and target not in ALLOWED[folder]:
                yield f"{where}: {folder}/ must not include {header}: allowed are " \
                      f"{', '.join(sorted(ALLOWED[folder])) or 'no other folders'}"
        elif target == "tests":
            yield f"{where}: {header} is a test's"
        elif quote == '"' and exists(os.path.join(os.path.dirname(path), header)):
            yield f"{where}: write the path from the repository's root: {os.path.dirname(path)}/{header}"


def cycle(graph):
    """A cycle of includes as a list of paths, or None."""
    state, stack = {}, []

    def visit(node):
        state[node] = 1
        stack.append(node)
        for other in graph.get(node, ()):
            if state.get(other) == 1:
                return stack[stack.index(other):] + [other]
            if other not in state:
                found = visit(other)
                if found:
                    return found
        stack.pop()
        state[node] = 2
        return None

    for node in sorted(graph):
        if node not in state:
            found = visit(node)
            if found:
                return found
    return None


def self_test():
    """The checker finds what it is there to find: a test that cannot fail proves nothing."""
    known = {"server/a.h", "engine/a.h", "kernels/a.h", "kernels/cpu/b.h", "config/a.h", "cli/a.h"}.__contains__
    bad = [
        ("engine/x.cc", '#include "server/a.h"\n'),
        ("engine/x.cc", '#include "config/a.h"\n'),
        ("kernels/x.cc", '#  include "engine/a.h"\n'),
        ("config/x.h", '#include "kernels/a.h"\n'),
        ("server/x.cc", '#include "cli/a.h"\n'),
        ("engine/x.h", "#include <nlohmann/json.hpp>\n"),
        ("engine/x.cc", '#include "boost/asio.hpp"\n'),
        ("engine/x.cc", "#include <grpcpp/grpcpp.h>\n"),
        ("kernels/backend.h", "#include <cuda_runtime.h>\n"),
        ("kernels/cpu/x.cc", '#include "b.h"\n'),
        ("server/x.cc", '#include "tests/server/y.h"\n'),
    ]
    good = [
        ("cli/x.cc", '#include "server/a.h"\n#include "config/a.h"\n#include <CLI/CLI.hpp>\n#include <string>\n'),
        ("engine/x.cc", '#include "kernels/a.h"\n#include "nlohmann/json.hpp"\n'),
        ("kernels/cuda/x.cu", "#include <cuda_runtime.h>\n"),
        ("server/x.cc", '#include "atp/v1/inference.pb.h"\n#include "boost/asio.hpp"\n'),
    ]
    for path, text in bad:
        assert list(violations(path, text, known)), f"missed in {path}: {text}"
    for path, text in good:
        assert not list(violations(path, text, known)), f"false alarm in {path}: {text}"
    assert cycle({"a": ["b"], "b": ["c"], "c": ["a"]}) and not cycle({"a": ["b", "c"], "b": ["c"]})


def main():
    self_test()
    found, graph = [], {}
    exists = lambda path: os.path.isfile(os.path.join(ROOT, path))
    for path in files():
        with open(os.path.join(ROOT, path), encoding="utf-8") as file:
            text = file.read()
        found += violations(path, text, exists)
        graph[path] = [header for _, header in INCLUDE.findall(text) if header != path and exists(header)]
    loop = cycle(graph)
    if loop:
        found.append("includes go in a circle: " + " -> ".join(loop))
    if len(graph) < 20:
        found.append(f"only {len(graph)} source files under {ROOT}: is this the repository?")
    print("\n".join(found) or f"{len(graph)} files keep to the arrows")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
