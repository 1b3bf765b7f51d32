"""Every setting of the service, once: the command line and the table in the docs read it here.

Nothing here imports jax or a library of the service, so that `--help` does not wait for them. Names are vLLM's wherever vLLM
has one.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping
from typing import Self

from step3_jax.engine.setting import check_name, check_values, define, format_table, settings_of

# In the order of the help and the docs.
GROUPS = {
    "address": "address and keys",
    "limits": "limits",
    "answers": "answers",
    "process": "life of the process",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The settings of the service; `docs/serving.md` shows them as a table.

    Raises:
      ValueError: For a value that is not allowed; the message names the field, the value and what is allowed.
    """

    host: str = define("127.0.0.1", "address to listen on; 0.0.0.0 for all interfaces", "address", metavar="ADDRESS")
    port: int = define(8000, "port to listen on; 0 for a free one", "address", least=0, most=65535, metavar="PORT")
    api_key: tuple[str, ...] = define(
        (), "key that clients must send; may be repeated", "address", auto="no key is required", metavar="KEY"
    )
    served_model_name: tuple[str, ...] = define(
        (),
        "names that requests may use for the model; answers have the first",
        "address",
        auto="the name of the model's folder",
        metavar="NAME",
        takes_several=True,
    )
    ssl_keyfile: str | None = define(None, "private key for TLS", "address", auto="no TLS", metavar="FILE")
    ssl_certfile: str | None = define(None, "certificate for TLS", "address", auto="no TLS", metavar="FILE")
    allowed_origins: tuple[str, ...] = define(
        (), "origins whose pages may call the service (CORS)", "address", metavar="ORIGIN", takes_several=True
    )
    ui: bool | None = define(None, "the chat page at /", "address", auto="on a loopback address")
    docs: bool = define(False, "serve a page about the API at /docs", "address")
    metrics_key: str | None = define(None, "key for /metrics", "address", auto="no key is required", metavar="KEY")
    metrics_prefix: str = define(
        "step3", "prefix of the metrics' names; vllm for its dashboards", "address", metavar="NAME"
    )
    max_num_queued_reqs: int | None = define(
        None,
        "most completions that run or wait; further requests get a 503",
        "limits",
        least=1,
        auto="four times max_num_seqs",
    )
    max_num_queued_tokens: int | None = define(
        None, "most prompt tokens of requests that run or wait", "limits", least=1, auto="no limit"
    )
    max_n: int = define(16, "most completions of one prompt", "limits", least=1)
    max_body_bytes: int = define(32 * 2**20, "largest request body, in bytes", "limits", least=1024, metavar="BYTES")
    request_timeout: float = define(
        0.0,
        "seconds after which a request ends with finish reason length; 0 for no limit",
        "limits",
        least=0,
        metavar="S",
    )
    max_images: int = define(16, "most images in a request; 0 refuses them", "limits", least=0)
    max_image_pixels: int = define(40_000_000, "largest image, width times height", "limits", least=1)
    max_image_bytes: int = define(20 * 2**20, "largest image file, in bytes", "limits", least=1, metavar="BYTES")
    allowed_media_domains: tuple[str, ...] = define(
        (),
        "hosts that images may be fetched from",
        "limits",
        auto="none: images come as data: URLs",
        metavar="HOST",
        takes_several=True,
    )
    reasoning_parser: str = define(
        "step3",
        "how reasoning is separated from the answer; none leaves it in the content",
        "answers",
        choices=("step3", "none"),
    )
    generation_config: str = define(
        "auto",
        "where sampling defaults come from: auto is the model's generation_config.json, none is vLLM's defaults",
        "answers",
        choices=("auto", "none"),
    )
    sse_keep_alive_interval: float = define(
        15.0, "seconds of silence after which a stream sends a comment; 0 for never", "answers", least=0, metavar="S"
    )
    shutdown_timeout: float = define(
        30.0, "seconds that requests have to finish after SIGTERM or Ctrl-C", "process", least=0, metavar="S"
    )
    stall_seconds: float = define(
        60.0,
        "seconds without a token, while there is work, after which /ready is 503",
        "process",
        least=0.1,
        metavar="S",
    )
    warm_up: bool = define(True, "compile all programs before /health is 200", "process")
    log_prompts: bool = define(False, "log the text of prompts", "process")

    def __post_init__(self) -> None:
        check_values(self)
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("ssl_keyfile and ssl_certfile belong together: give both or neither")

    @classmethod
    def of(cls, values: Mapping[str, object], *, source: str = "") -> Self:
        """Settings from names and values; lists stand for tuples.

        Args:
          values: The fields that are not at their defaults.
          source: Where they come from; prefixed to error messages.

        Raises:
          ValueError: For a value that is not allowed, or an unknown name; the message suggests the nearest one.
        """
        prefix = f"{source}: " if source else ""
        for name in values:
            check_name(name, settings_of(cls), prefix=prefix)
        read = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        try:
            return cls(**read)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from None

    def to_dict(self) -> dict[str, object]:
        """All fields by name, lists for tuples."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def has_page(self) -> bool:
        """Whether the chat page is served."""
        return _is_loopback(self.host) if self.ui is None else self.ui


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    print(format_table(ServerConfig), end="")
