"""Load tests of any OpenAI-compatible service: what it holds, and how the client knows.

The client is small and our own, over aiohttp. GuideLLM 0.8.1, read for the same job, pins
click to 8.4 (the rest of the environment has 8.5), counts ttft from the actual sending and not
from the intended time, searches goodput over clients and not over arrivals, and does not tell
how busy the client itself was.
"""
