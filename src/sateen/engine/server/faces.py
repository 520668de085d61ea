"""The `serve` verb: opens the port, loads the model, runs until it is told to end."""

from __future__ import annotations

import ipaddress
import logging
import os
from importlib.util import find_spec

from sateen.errors import BackendUnavailable, ConfigError

log = logging.getLogger("sateen.server")
KEY_VARIABLE = "SATEEN_API_KEY"
PACKAGES = ("fastapi", "prometheus_client", "uvicorn")


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    served_model_name: str | None = None,
    max_num_seqs: int = 16,
    max_model_len: int | None = None,
    max_waiting: int = 256,
    max_body_bytes: int = 4 << 20,
    request_timeout: float | None = None,
    drain_seconds: float = 30.0,
    draft: str = "auto",
    weights: str = "auto",
    attention: str = "auto",
    kv_cache_dtype: str = "auto",
    int8_budget: float = 0.05,
) -> int:
    """Serves a model over HTTP until SIGTERM or Ctrl-C; prints the address when it answers.

    Raises:
        BackendUnavailable: packages of the extra `serve` are missing.
        ConfigError: a flag that is not accepted, or an address that cannot be opened.
    """
    if missing := [name.replace("_", "-") for name in PACKAGES if find_spec(name) is None]:
        raise BackendUnavailable(f"serve needs {', '.join(missing)}; run: pip install 'sateen[serve]'")
    key = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise ConfigError("the API key must be printable ASCII without spaces around it")

    from sateen.engine.server.run import Server, bind, url

    try:
        listener = bind(host, port)  # before the model is read, because a taken port is known by then
    except OSError as error:
        raise ConfigError(f"cannot open {host} port {port}: {error.strerror}; give another --port") from error
    with listener:
        is_local = _is_loopback(listener.getsockname()[0])
        if key is None and not is_local:
            log.warning("%s can be reached from other machines, and there is no --api-key", host)

        from sateen.engine.engine import LLM
        from sateen.engine.server.app import Service
        from sateen.engine.server.gate import Doors

        llm = LLM(
            model, draft=draft, weights=weights, attention=attention, kv_cache_dtype=kv_cache_dtype,
            int8_budget=int8_budget, max_num_seqs=max_num_seqs, max_model_len=max_model_len,
            max_waiting=max_waiting,
        )  # fmt: skip
        doors = Doors(key, max_body_bytes, only_local_names=key is None and is_local)
        service = Service(
            llm, name=served_model_name or model, doors=doors, deadline_s=request_timeout,
            max_choices=max_num_seqs + max_waiting,
        )  # fmt: skip
        server = Server(service, drain_s=drain_seconds, on_ready=lambda: print(url(listener), flush=True))
        server.run(sockets=[listener])
    return 0 if service.engine.failure is None else 1


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
