"""`localspec serve`: parse, load, listen."""

from __future__ import annotations

import importlib.util
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from localspec.commands.models import open_models
from localspec.commands.options import (
    apply_options,
    draft_options,
    drafter_spec,
    load_options,
    remember_options,
    sampling_options,
    sampling_params,
)

if TYPE_CHECKING:
    from localspec.drafters import DrafterSpec
    from localspec.server.batch import BatchSettings
    from localspec.server.settings import ServerSettings

F = TypeVar("F", bound=Callable[..., Any])

_TEMPERATURE = 0.7
_MIB = 1 << 20
_EXTRAS = ("starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance")


def _listen_options(command: F) -> F:
    """Where to listen, and who is let in."""
    options = [
        click.option("--host", default="127.0.0.1", show_default=True, metavar="HOST", help="0.0.0.0: all interfaces."),
        click.option(
            "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, metavar="N", help="0: a free one."
        ),
        click.option(
            "--api-key",
            multiple=True,
            envvar="LOCALSPEC_API_KEY",
            metavar="KEY",
            help="Clients must send it; also from LOCALSPEC_API_KEY. Repeatable.",
        ),
        click.option(
            "--api-key-file",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="The same from a file, one a line.",
        ),
        click.option(
            "--cors", multiple=True, metavar="ORIGIN", help="Let this origin's pages in; * for all. Repeatable."
        ),
        click.option(
            "--allow-host", multiple=True, metavar="NAME", help="A name by which this machine is called. Repeatable."
        ),
        click.option(
            "--alias",
            "-a",
            "--served-model-name",
            multiple=True,
            metavar="NAME",
            help="What the model is called, besides its own name. Repeatable.",
        ),
        click.option("--log-requests", is_flag=True, help="Print a line per request."),
    ]
    return apply_options(options, command)


def _work_options(command: F) -> F:
    """How much to take on."""
    seconds = click.FloatRange(min=0.1)
    mebibytes = click.IntRange(min=0, max=1 << 24)
    options = [
        click.option(
            "--parallel",
            "-np",
            "--max-num-seqs",
            "--decode-concurrency",
            type=click.IntRange(1, 256),
            default=4,
            show_default=True,
            metavar="N",
            help="Requests answered at once.",
        ),
        click.option(
            "--queue",
            type=click.IntRange(0, 65536),
            default=64,
            show_default=True,
            metavar="N",
            help="Requests that may wait; more are told to come back (429).",
        ),
        click.option(
            "--cache-ram",
            "-cram",
            type=mebibytes,
            default=1024,
            show_default=True,
            metavar="MIB",
            help="Memory for copies of earlier prompts and answers.",
        ),
        click.option(
            "--max-body", type=mebibytes, default=8, show_default=True, metavar="MIB", help="Longest request."
        ),
        click.option("--timeout", type=seconds, metavar="S", help="Longest time for an answer [default: any]."),
        click.option(
            "--drain", type=seconds, default=10.0, show_default=True, metavar="S", help="When stopped: time to finish."
        ),
    ]
    return apply_options(options, command)


@click.command()
@_listen_options
@_work_options
@load_options
@draft_options
@remember_options(None)
@sampling_options
def serve(host: str, port: int, log_requests: bool, **options: Any) -> None:
    """Serve a model to programs that speak OpenAI's or Anthropic's interface, with a page to watch it.

    Requests share the passes of the model. Sampling options and --drafter stand for what a request does not say.
    """
    _require_extras()
    from localspec.server.listener import address_of, bind
    from localspec.server.program import Program
    from localspec.terminal import notes

    spec = drafter_spec(options)
    batch, settings = _batch_settings(options), _server_settings(options, spec)
    if log_requests:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    with (
        bind(host, port) as listening,
        open_models(options, spec, num_sequences=batch.num_sequences, batch=True, offer_pull=True) as pair,
        Program(pair, batch, settings, log_requests=log_requests) as program,
    ):
        for note in notes(pair):
            click.echo(click.style(f"note: {note}", dim=True), err=True)
        address = address_of(listening)
        click.echo(f"{settings.names[0]} is served at {address}/v1, the page at {address}/ (Ctrl-C stops)", err=True)
        with _until_told():
            program.run(listening)
        click.echo("stopped", err=True)


@contextmanager
def _until_told() -> Iterator[None]:
    """SIGTERM and Ctrl-C end what is inside, as they are meant to."""

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, former)


def _require_extras() -> None:
    from localspec.errors import BackendMissingError

    missing = [name for name in _EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendMissingError(
            f"the server needs {', '.join(missing)}", fix='Install it with `pip install "localspec[server]"`.'
        )


def _batch_settings(options: dict[str, Any]) -> BatchSettings:
    from localspec.server.batch import BatchSettings

    return BatchSettings(
        parallel=options["parallel"],
        queue=options["queue"],
        cache_bytes=options["cache_ram"] * _MIB,
        acceptance=options["acceptance"],
    )


def _server_settings(options: dict[str, Any], spec: DrafterSpec) -> ServerSettings:
    from localspec.server.settings import ServerSettings
    from localspec.server.speculation import Speculation

    return ServerSettings(
        names=(*options["alias"], _own_name(options)),
        defaults=sampling_params(options, default_temperature=_TEMPERATURE),
        speculation=Speculation(spec),
        api_keys=_keys(options),
        cors=options["cors"],
        hosts=options["allow_host"],
        max_body_bytes=max(1, options["max_body"]) * _MIB,
        answer_s=options["timeout"],
        drain_s=options["drain"],
    )


def _own_name(options: dict[str, Any]) -> str:
    """What the user called the model; of a file its name without the ending."""
    from localspec.loading import BUNDLED

    name: str = options["pair"] or options["target"] or BUNDLED
    path = Path(name)
    return path.stem if path.suffix == ".gguf" else path.name if path.exists() else name


def _keys(options: dict[str, Any]) -> tuple[str, ...]:
    from localspec.errors import SettingError

    file: Path | None = options["api_key_file"]
    if file is None:
        lines = []
    else:
        try:
            lines = file.read_text(encoding="utf-8").split()
        except (OSError, ValueError) as error:
            raise SettingError(f"--api-key-file cannot be read: {error}") from None
        if not lines:
            raise SettingError("--api-key-file holds no key", got=file)
    keys = (*options["api_key"], *lines)
    if any(not key.strip() or not key.isascii() for key in keys):
        raise SettingError("an API key is empty or not ASCII", fix="Headers carry ASCII only.")
    return keys
