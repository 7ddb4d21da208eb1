"""`m3 demo`: semantic search over the documentation of torch and numpy, with a model made on the spot."""

from m3model.demo.run import run_demo

__all__ = ["run_demo"]
