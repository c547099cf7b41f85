"""A small Python client of atp's gRPC interface. See README.md beside this package."""

from .client import AtpError, Client, Generation

__all__ = ["AtpError", "Client", "Generation"]
