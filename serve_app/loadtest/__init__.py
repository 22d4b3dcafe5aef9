"""Load tests of any OpenAI-compatible service: what it holds, and how the client knows.

command.py   START HERE: the two commands: what is measured, written and printed; exit codes
options.py   the options of `loadtest` and `capacity`; light, for `--help`
session.py   one target, its client processes, and the stages so far
stage.py     what is offered: times, lengths and texts of requests
traces.py    recorded loads to replay
workers.py   the client processes: hand out a stage, send it, collect samples
client.py    one streamed request, and when its parts came
scrape.py    the server's own view, from its Prometheus page
summary.py   from samples to percentiles, rates and goodput within an SLO
report.py    the JSON document, and the table people read
page.py      the HTML page with its charts
compare.py   whether one report is worse than another
capacity.py  the highest rate within an SLO, and the config that follows from it

The client is small and our own, over aiohttp. GuideLLM 0.8.1, read for the same job, pins
click to 8.4 (the rest of the environment has 8.5), counts ttft from the actual sending and not
from the intended time, searches goodput over clients and not over arrivals, and does not say how
busy the client itself was.
"""
