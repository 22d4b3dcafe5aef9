"""The names that the one model answers to, by itself or with an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.errors import InvalidRequest, ModelNotFound


@dataclass(frozen=True, slots=True)
class Names:
    """The names of the model.

    Args:
        names: at least one; the first is its own, which an answer bears if none was asked for.
        adapters: names of LoRA adapters that it answers with when they are asked for.
    """

    names: tuple[str, ...]
    adapters: tuple[str, ...] = ()

    @property
    def own(self) -> str:
        """The model's own name."""
        return self.names[0]

    def answering(self, asked: object) -> str:
        """Return the name to answer under.

        Args:
            asked: a request's `model`; null and an empty text ask for none.

        Raises:
            InvalidRequest: it is no text.
            ModelNotFound: it names another model.
        """
        if asked is None or asked == "":
            return self.own
        if not isinstance(asked, str):
            raise InvalidRequest("`model`: must be a string", param="model")
        if asked not in self.names and asked not in self.adapters:
            raise ModelNotFound(
                f"this model is not served here; ask for {self.own!r}, or leave `model` out",
                param="model",
            )
        return asked

    def adapter(self, name: str) -> str:
        """Return the adapter to answer with under a name; "" is the model itself."""
        return name if name in self.adapters else ""
