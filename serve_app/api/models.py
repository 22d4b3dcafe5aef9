"""`GET /v1/models`: the one model, under each of its names and those of its adapters."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.api.names import Names
from serve_app.api.response_types import Model
from serve_app.api.sse import dump
from serve_app.api.status_page import Service


class Models:
    """Lists the names.

    Args:
        names: of the one model; the owner of each is the part before its slash.
        created: when the model was made available, in Unix seconds.
        window: prompt and completion together, in tokens; None asks `service`, until it knows.
        service: the service, all of its processes.
    """

    def __init__(
        self, names: Names, *, created: int, window: int | None, service: Service | None
    ) -> None:
        self._names = names
        self._created = created
        self._window = window
        self._service = service

    def routes(self) -> list[Route]:
        """Return both routes."""
        return [
            Route("/v1/models", self._list),
            Route("/v1/models/{model:path}", self._retrieve),
        ]

    async def _list(self, _request: Request) -> Response:
        await self._ask_window()
        cards = [self._card(name) for name in (*self._names.names, *self._names.adapters)]
        return Response(dump({"object": "list", "data": cards}), media_type="application/json")

    async def _retrieve(self, request: Request) -> Response:
        name = self._names.answering(request.path_params["model"])
        await self._ask_window()
        return Response(dump({**self._card(name)}), media_type="application/json")

    def _card(self, name: str) -> Model:
        card: Model = {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": name.partition("/")[0],
        }
        if self._names.adapter(name):
            card |= {"owned_by": self._names.own.partition("/")[0], "parent": self._names.own}
        if self._window is not None:
            card["max_model_len"] = self._window
        return card

    async def _ask_window(self) -> None:
        if self._window is None and self._service is not None:
            self._window = (await self._service.look()).max_context_tokens
