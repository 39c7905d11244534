"""What runs in a process that is going to be killed."""

from __future__ import annotations

from pathlib import Path

from localspec.hub.client import Hub, Patience
from localspec.hub.name import HubName
from localspec.hub.pull import pull


def pull_into(cache: str, endpoint: str, name: str) -> None:
    """Pull; nobody waits for the result."""
    pull(HubName.parse(name), hub=Hub(endpoint, Path(cache), Patience()))
