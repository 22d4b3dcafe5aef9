"""Spans reach a collector over OTLP, and without the exporter the message says what to install."""

import http.server
import sys
import threading

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from ray.serve._private.tracing_utils import _load_span_processors

from serve_app.errors import ConfigError
from serve_app.telemetry.tracing import otlp


@pytest.fixture
def collector():
    """A server of OTLP's path for traces; gives its URL and the names of the spans it got."""
    names = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            sent = ExportTraceServiceRequest.FromString(body)
            spans = [s for r in sent.resource_spans for scope in r.scope_spans for s in scope.spans]
            names.extend((self.path, span.name) for span in spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", names
        server.shutdown()


def test_otlp_spans_reach_the_collector_that_the_environment_names(collector, monkeypatch):
    """As Serve does it: a provider with our processors, then spans."""
    url, names = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_COMPRESSION", raising=False)
    provider = TracerProvider()
    for processor in _load_span_processors("serve_app.tracing:otlp", "x.json"):
        provider.add_span_processor(processor)
    with provider.get_tracer("test").start_as_current_span("generate"):
        pass
    provider.shutdown()
    assert names == [("/v1/traces", "generate")]


def test_otlp_names_a_missing_exporter(monkeypatch):
    """One line that says what to install, and where."""
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"on every node: pip install 'serve-app\[otlp\]'"):
        otlp()
