"""Python stubs of the gRPC services, generated with Debian's protoc and grpc_python_plugin into a temporary folder.

    from grpc_stubs import health, inference, reflection     # each has .messages and .services
"""

import atexit
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import types

from server_fixture import skip, source_dir

try:
    import grpc  # noqa: F401  (the generated modules import it)
except ImportError:
    skip("python3-grpcio is not installed (make deps installs it)")


def _generate():
    protoc, plugin = shutil.which("protoc"), shutil.which("grpc_python_plugin")
    if not protoc or not plugin:
        skip("protoc or grpc_python_plugin is not installed (make deps installs them)")
    out = tempfile.mkdtemp(prefix="atp-stubs-")
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    here = os.path.dirname(os.path.abspath(__file__))
    for root, file in ((os.path.join(source_dir(), "proto"), "atp/v1/inference.proto"),
                       (os.path.join(here, "protos"), "health.proto"),
                       (os.path.join(here, "protos"), "reflection.proto")):
        subprocess.run([protoc, "-I", root, f"--python_out={out}", f"--grpc_python_out={out}",
                        f"--plugin=protoc-gen-grpc_python={plugin}", file], check=True)
    sys.path.insert(0, out)


def _load(module):
    return types.SimpleNamespace(messages=importlib.import_module(module + "_pb2"),
                                 services=importlib.import_module(module + "_pb2_grpc"))


_generate()
inference = _load("atp.v1.inference")
health = _load("health")
reflection = _load("reflection")
