"""Serve's traces sent to an OpenTelemetry collector, where the Serve config asks for it.

`tracing_config: {enabled: true, exporter_import_path: "serve_app.tracing:otlp"}` does.

Where to and how is said by OpenTelemetry's own variables in the environment of every node:
`OTEL_EXPORTER_OTLP_ENDPOINT` (default http://localhost:4318), `OTEL_SERVICE_NAME`, and the rest of
https://opentelemetry.io/docs/specs/otel/protocol/exporter/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve_app.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor


def otlp() -> list[SpanProcessor]:
    """Return what sends spans by OTLP over HTTP, in batches and beside the requests.

    Serve calls it once in each process that handles requests. A collector that is away costs
    the spans and no request.

    Raises:
        ConfigError: the exporter's package is not installed on this node.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"traces need {error.name} on every node: pip install 'serve-app[otlp]'",
            param="tracing_config",
        ) from None
    return [BatchSpanProcessor(OTLPSpanExporter())]
