"""What belongs to one quickstart: a folder a port, which one process at a time may hold.

    ~/.cache/serve-app/quickstart/<port>/
      lock            held by the running quickstart
      quickstart.yaml where a port is not the default
      token, ray-token, hf/   secrets and weights; removed at the end
      serve-run.log

The demo model itself is made once for all of them, see `scripts.local_hub.model`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

# On Linux, too, this makes Ray (2.60) take 127.0.0.1 for its node's address, and then its servers
# listen there alone; `_node_ip_address="127.0.0.1"` of `ray.init` is replaced by the machine's
# address. One port stays open on all interfaces: the gRPC server that each replica of Serve binds
# to `[::]:0`, whatever is set. It asks for Ray's token like all others.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class Failure(Exception):
    """The demo cannot go on; the message names the fix."""


@dataclass(frozen=True, slots=True)
class State:
    """The files of one quickstart.

    Args:
        folder: of its port.
    """

    folder: Path

    @property
    def token(self) -> Path:
        """The Hub's token, which the config names."""
        return self.folder / "token"

    @property
    def ray_token(self) -> Path:
        """What whoever speaks to this Ray instance has to know."""
        return self.folder / "ray-token"

    @property
    def hf_home(self) -> Path:
        """The home of huggingface_hub on this instance's only node."""
        return self.folder / "hf"

    @property
    def config(self) -> Path:
        """The config, where the one in the repository names other ports."""
        return self.folder / "quickstart.yaml"

    @property
    def log(self) -> Path:
        """The output of `serve run`."""
        return self.folder / "serve-run.log"

    def environment(self) -> dict[str, str]:
        """Return the environment of every process: ours without the user's Hub and Ray settings."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "RAY_", "TRANSFORMERS_"))
        }
        return inherited | {
            **LOOPBACK,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.ray_token),
            "HF_HOME": str(self.hf_home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }


@contextlib.contextmanager
def hold(folder: Path, *, port: int) -> Iterator[State]:
    """Hold the folder of a port, with a new Ray token; secrets and weights go at the end.

    Args:
        folder: the state of all quickstarts of this user.
        port: of the API.

    Raises:
        Failure: another quickstart holds it.
    """
    state = State(folder / str(port))
    state.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _lock(state.folder / "lock", port):
        try:
            write_secret(state.ray_token, secrets.token_hex(32))
            yield state
        finally:
            state.token.unlink(missing_ok=True)
            state.ray_token.unlink(missing_ok=True)
            shutil.rmtree(state.hf_home, ignore_errors=True)


def write_secret(path: Path, value: str) -> None:
    """Write a file that only its owner can read, whatever was there before."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(value)


@contextlib.contextmanager
def _lock(path: Path, port: int) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Failure(
                f"a quickstart runs on port {port} already ({file.read().strip()}); stop it with "
                "Ctrl-C, or choose another port with --port and --hub-port."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            # A file system without locks: the ports themselves are checked next.
        file.truncate(0)
        since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        file.write(f"process {os.getpid()}, since {since}")
        file.flush()
        yield
