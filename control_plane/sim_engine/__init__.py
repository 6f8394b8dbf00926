"""A simulated vLLM server: the engine model of ``engines/model.py`` behind vLLM's HTTP API, in real time."""

from control_plane.sim_engine.engine import SimEngine
from control_plane.sim_engine.run import run_sim_engine, serve

__all__ = ["SimEngine", "run_sim_engine", "serve"]
