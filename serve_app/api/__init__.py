"""The OpenAI-compatible HTTP surface; knows `LLMEngine` and nothing of Ray, torch or a Hub.

app.py                 START HERE: every route and every layer, in the order a request meets them
middleware.py          the request id, and the one end of every request
auth.py, hosts.py      whose key a request has; the names this service may be called by
keys.py, key_limits.py the file of API keys; what each may use (usage.py: what it has used)
intake.py              reads bodies (request_body.py: from bytes to a JSON object)
generation.py          the way of a generation request: read, check, generate, answer
schemas.py             types and ranges (validation.py: the first fault in plain words)
shapes.py              other shapes of a chat's body
supported_fields.py    every known field: done, ignored, or refused
messages.py, tools.py  conversations; functions that a model may call
structured_output.py   what the text must look like
convert.py             from a checked request to the engine's requests
choices.py             all choices of one request, read as one flow
delivery.py            the answer: one object, or a stream of events (sse.py)
chat_response.py       writes a chat completion (completion_response.py: a completion)
tool_parser.py         tool calls out of a model's text (formats/: in the forms models write)
responses_request.py   `POST /v1/responses` as a chat (responses_response.py: its answer)
response_types.py      OpenAI's response objects (logprobs.py, error_body.py)
tokenize.py            `/tokenize`, `/detokenize`, `/tokenizer_info`
models.py, names.py    `GET /v1/models`; the names the one model answers to
status_page.py         `/` and `/status`
request_record.py      what is known of one request at its end
paths.py               paths as clients write them
offload.py, shared.py  work off the event loop; one computation for all who ask at once
"""
