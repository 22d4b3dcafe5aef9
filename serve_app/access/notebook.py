"""Why a notebook has no token although its user believes so."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator

PROCESS_STARTED = time.time()  # as far as this package can know: when it was imported


def reasons() -> Iterator[str]:
    """Say why this notebook's kernel finds no token; nothing outside a notebook."""
    if "google.colab" in sys.modules:
        yield _colab()
    elif "ipykernel" in sys.modules:
        since = time.strftime("%H:%M", time.localtime(PROCESS_STARTED))
        yield (
            f"this kernel has run since {since} at the latest and has no HF_TOKEN: a variable that "
            "was exported later, or in another shell, is not seen. Start Jupyter from a shell that "
            "has it, or run `huggingface_hub.login()` here"
        )


def _colab() -> str:
    userdata = importlib.import_module("google.colab.userdata")
    try:
        userdata.get("HF_TOKEN")
    except userdata.NotebookAccessError:
        return (
            "Colab has a secret HF_TOKEN that this notebook may not read: switch on "
            "`Notebook access` beside it in the Secrets panel"
        )
    except userdata.SecretNotFoundError:
        return "Colab has no secret HF_TOKEN: add one in the Secrets panel (the key, on the left)"
    except Exception as error:  # noqa: BLE001 (a runtime without the panel, or a timeout)
        return f"Colab's secrets could not be read ({type(error).__name__})"
    return "Colab's secret HF_TOKEN was added after huggingface_hub looked: restart the session"
