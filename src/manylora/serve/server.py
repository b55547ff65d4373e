"""The process: load, listen, and end in order when a signal comes.

The first SIGTERM or Ctrl-C: new requests get 503, those accepted are finished, exit code 0. The
second ends at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from rich.console import Console

from manylora.serve.app import create_app
from manylora.serve.engine import Engine
from manylora.serve.limits import KEY_VARIABLE, Limits, check_host, is_loopback
from manylora.serve.metrics import Metrics
from manylora.serve.runs import load_runs

_SLOW_READERS = 10  # seconds that clients have to read the end of their answers


class Server(uvicorn.Server):
    """uvicorn, stopped only when the engine has finished what it was given."""

    def __init__(self, config: uvicorn.Config, engine: Engine, console: Console) -> None:
        super().__init__(config)
        self.engine, self.console = engine, console
        engine.on_drained = self._drained

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=sockets)
        if not self.should_exit:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            names = ", ".join(self.engine.runs.models)
            self.console.print(f"serving {names} on http://{shown}:{port}/v1", soft_wrap=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.engine.draining:
            sys.stderr.flush()
            os._exit(128 + sig)
        self.engine.drain()
        self.console.print("finishing what was asked; once more to stop at once")

    def _drained(self) -> None:
        self.should_exit = True


def serve(
    folders: Sequence[Path],
    host: str,
    port: int,
    limits: Limits,
    console: Console,
    allow_anyone: bool = False,
) -> None:
    """Serve runs until a signal; port 0 takes a free one. The address is printed when it is ready.

    Raises ValueError where the address is open to others without a key; as `load_runs`.
    """
    key = os.environ.get(KEY_VARIABLE)
    check_host(host, key, allow_anyone)
    engine = Engine(load_runs(folders), limits, Metrics())
    config = uvicorn.Config(
        create_app(engine, key, int(time.time()), key is None and is_loopback(host)),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=_SLOW_READERS,
    )
    server = Server(config, engine, console)
    engine.start()
    server.run()
