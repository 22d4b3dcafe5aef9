"""The OpenAI-compatible HTTP surface: schemas, conversion, routes, streaming."""
