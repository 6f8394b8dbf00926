"""What to send to an engine and how to read what it answers."""

from control_plane.engines.answers import AnswerSink, StreamSink, answer_output, delta_text
from control_plane.engines.body import build_wire
from control_plane.engines.openai_compatible import OpenAICompatibleEngine

__all__ = ["AnswerSink", "OpenAICompatibleEngine", "StreamSink", "answer_output", "build_wire", "delta_text"]
