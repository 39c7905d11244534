"""How the HTTP side behaves; what belongs to the model and to the batch is set there."""

from __future__ import annotations

from dataclasses import dataclass, field

from localspec.sampling import SamplingParams
from localspec.server.speculation import Speculation


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """names: of the model; clients may use any, and see the first.  defaults, speculation: for what a request does
    not say.  api_keys: one of them must be sent, if there are any.  cors: origins whose pages may read answers ("*":
    all).  hosts: names under which browsers may reach the server, besides localhost, this machine's name and addresses.

    Times in seconds.  header_s: until a request's head has come.  body_s: its body.  write_s: that a client may leave
    what was sent unread.  answer_s: until an answer is finished (None: no limit).  idle_s: between signs of life in a
    quiet stream.  drain_s: that running answers get when the server is told to stop.
    """

    names: tuple[str, ...]
    defaults: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.7))
    speculation: Speculation = field(default_factory=Speculation)
    api_keys: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    max_header_bytes: int = 32 << 10
    max_connections: int = 512
    header_s: float = 10.0
    body_s: float = 30.0
    write_s: float = 60.0
    answer_s: float | None = None
    idle_s: float = 10.0
    drain_s: float = 10.0
