"""Clients that go away, are slow on purpose, send too much, or are not let in: the server goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from starlette.datastructures import Headers

from localspec.pair import Pair
from localspec.server.batch import BatchSettings
from localspec.server.guards import host_check
from localspec.server.refusals import Refusal
from localspec.server.settings import ServerSettings
from tests.server.running import LONG_S, Served, serving, wait_until

pytestmark = pytest.mark.real

KEY = {"Authorization": "Bearer secret"}
ORIGIN = "http://localhost:3000"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "seed": 1}
ENDLESS: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True, "seed": 1}

QUICK = ServerSettings(
    names=("tiny",),
    api_keys=("other", "secret"),
    cors=(ORIGIN,),
    max_body_bytes=20_000,
    max_header_bytes=8_000,
    header_s=0.5,
    body_s=0.5,
    write_s=0.5,
    idle_s=0.05,
)


@pytest.fixture(scope="module")
def quick(served_pair: Pair) -> Iterator[Served]:
    """A server for one request at a time, with little patience, a key and another origin."""
    with serving(served_pair, BatchSettings(parallel=1, queue=1), QUICK) as server:
        yield server


@pytest.fixture
def client(quick: Served) -> Iterator[httpx2.Client]:
    """Plain HTTP, with the key."""
    with httpx2.Client(base_url=quick.address, timeout=LONG_S, headers=KEY) as client:
        yield client


@contextmanager
def raw(served: Served) -> Iterator[socket.socket]:
    """A bare connection."""
    parts = urlsplit(served.address)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=LONG_S) as connection:
        yield connection


def head(served: Served, path: str, length: int) -> bytes:
    """The head of a POST."""
    host = urlsplit(served.address).netloc
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "Authorization: Bearer secret", "", ""]).encode()


def drained(connection: socket.socket) -> bytes:
    """Everything until the other side closes."""
    data = b""
    try:
        while chunk := connection.recv(65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


# ---------------------------------------------------------------- clients that go away


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_away_frees_its_place(quick: Served, client: httpx2.Client, streaming: bool) -> None:
    with raw(quick) as connection:
        body = json.dumps({**ENDLESS, "stream": streaming}).encode()
        connection.sendall(head(quick, "/v1/completions", len(body)) + body)
        if streaming:
            assert b"200" in connection.recv(64)
        wait_until(lambda: quick.num_busy == 1)
    wait_until(lambda: quick.num_busy == 0)
    assert client.post("/v1/chat/completions", json=HELLO).is_success


def test_a_cancelled_answer_leaves_what_it_read_in_the_cache(quick: Served, client: httpx2.Client) -> None:
    prompt = {"prompt": "It was the ninth of May, and the sea was calm. " * 6}
    with client.stream("POST", "/v1/completions", json={**ENDLESS, **prompt, "stream": True}) as response:
        next(response.iter_lines())
        wait_until(lambda: quick.num_busy == 1)
    wait_until(lambda: quick.num_busy == 0)
    usage = client.post("/v1/completions", json={**prompt, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_a_full_queue_says_when_to_come_back(quick: Served, client: httpx2.Client) -> None:
    with raw(quick) as first, raw(quick) as second:
        body = json.dumps({**ENDLESS, "stream": True}).encode()
        for number, connection in enumerate((first, second), 1):
            connection.sendall(head(quick, "/v1/completions", len(body)) + body)
            wait_until(lambda number=number: quick.num_busy == number)  # type: ignore[misc]
        refused = client.post("/v1/chat/completions", json=HELLO)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        two = client.post("/v1/messages", json={**HELLO, "max_tokens": 1})
        assert (two.status_code, two.json()["error"]["type"]) == (429, "rate_limit_error")
    wait_until(lambda: quick.num_busy == 0)


def test_of_several_answers_none_stays_if_one_finds_no_room(quick: Served, client: httpx2.Client) -> None:
    assert client.post("/v1/chat/completions", json={**HELLO, "n": 4}).status_code == 429
    wait_until(lambda: quick.num_busy == 0)


def test_a_waiting_stream_shows_signs_of_life(quick: Served, client: httpx2.Client) -> None:
    with raw(quick) as first:
        body = json.dumps({**ENDLESS, "stream": True}).encode()
        first.sendall(head(quick, "/v1/completions", len(body)) + body)
        wait_until(lambda: quick.num_busy == 1)
        with client.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True}) as waiting:
            assert next(line for line in waiting.iter_lines() if line) == ": still here"
        wait_until(lambda: quick.num_busy == 1)
        asked = {**HELLO, "stream": True}
        with client.stream("POST", "/v1/messages", json=asked) as waiting:
            lines = (line for line in waiting.iter_lines() if line.startswith("event: "))
            assert [next(lines), next(lines)] == ["event: message_start", "event: ping"]
    wait_until(lambda: quick.num_busy == 0)


# ---------------------------------------------------------------- slow, half-open, too much


def test_a_head_that_never_comes_is_not_waited_for(quick: Served, client: httpx2.Client) -> None:
    with raw(quick) as silent, raw(quick) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        assert client.get("/health").is_success
        assert drained(silent) == b""
        assert drained(slow) == b""


def test_a_head_that_drips_is_not_waited_for(quick: Served) -> None:
    with raw(quick) as connection:
        connection.settimeout(0.1)
        for letter in b"GET /health HTTP/1.1\r\nX-Slow: " + b"a" * 100:
            try:
                connection.sendall(bytes([letter]))
                if connection.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                return
    pytest.fail("the connection stayed open")


def test_a_second_request_on_a_connection_has_the_same_time_limit(quick: Served) -> None:
    with raw(quick) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
        answered = drained(connection)
    assert answered.count(b"HTTP/1.1 200") == 1


def test_many_slow_connections_do_not_keep_others_out(quick: Served, client: httpx2.Client) -> None:
    slow = []
    try:
        for _ in range(200):
            parts = urlsplit(quick.address)
            connection = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=LONG_S)
            connection.sendall(b"POST / HTTP/1.1\r\nX: ")
            slow.append(connection)
        assert client.post("/v1/chat/completions", json=HELLO).is_success
        assert all(drained(connection) == b"" for connection in slow)
    finally:
        for connection in slow:
            connection.close()


def test_a_body_that_does_not_come_is_not_waited_for(quick: Served) -> None:
    with raw(quick) as connection:
        connection.sendall(head(quick, "/v1/chat/completions", 1000) + b'{"messages"')
        answer = drained(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("declared", [True, False])
def test_a_huge_body_is_refused_and_not_kept(quick: Served, client: httpx2.Client, declared: bool) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(2000):
            yield b" " * 10_000

    headers = {"Content-Type": "application/json"}
    if declared:
        headers["Content-Length"] = str(20_000_000)
    try:
        response = client.post("/v1/chat/completions", content=pieces(), headers=headers)
    except httpx2.TransportError:  # it closed the door while we were still shouting
        pass
    else:
        assert response.status_code == 413
        assert "--max-body" in response.json()["error"]["message"]
    assert client.get("/health").is_success


def test_a_huge_head_is_refused(client: httpx2.Client) -> None:
    assert client.get("/health", headers={"X-Long": "a" * 20_000}).status_code == 431


@pytest.mark.slow
def test_a_client_that_does_not_read_is_let_go(quick: Served) -> None:
    with raw(quick) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        get = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n\r\n"
        connection.sendall(get * 400)
        for _ in range(100):
            try:
                connection.sendall(get)
            except (BrokenPipeError, ConnectionResetError):
                return
            time.sleep(0.1)
    pytest.fail("the connection stayed open")


def test_a_body_must_say_that_it_is_json(client: httpx2.Client) -> None:
    refused = client.post("/v1/chat/completions", content=json.dumps(HELLO), headers={"Content-Type": "text/plain"})
    assert refused.status_code == 415
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert client.post("/v1/chat/completions", content=b"x", headers=packed).status_code == 415


# ---------------------------------------------------------------- who is let in


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": ""}])
def test_without_a_key_nobody_is_served(quick: Served, headers: dict[str, str]) -> None:
    refused = httpx2.post(f"{quick.address}/v1/chat/completions", json=HELLO, headers=headers)
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "invalid_api_key"
    refused = httpx2.post(f"{quick.address}/v1/messages", json=HELLO, headers=headers)
    assert refused.json()["error"]["type"] == "authentication_error"
    assert httpx2.get(f"{quick.address}/metrics", headers=headers).status_code == 401
    assert httpx2.get(f"{quick.address}/health", headers=headers).is_success
    assert httpx2.get(f"{quick.address}/", headers=headers).is_success


@pytest.mark.parametrize("headers", [KEY, {"X-Api-Key": "other"}, {"Authorization": "bearer secret"}])
def test_any_of_the_keys_will_do(quick: Served, headers: dict[str, str]) -> None:
    assert httpx2.get(f"{quick.address}/v1/models", headers=headers).is_success


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "localhost.evil.example", "", "a b"])
def test_another_hosts_name_is_refused(client: httpx2.Client, host: str) -> None:
    refused = client.get("/v1/models", headers={"Host": host})
    assert refused.status_code in (400, 403)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:80", "192.168.1.4", "host.docker.internal:80", "my.lan"]
)
def test_own_names_and_addresses_pass(host: str) -> None:
    host_check(["my.lan"])("/", Headers({"host": host}))
    with pytest.raises(Refusal):
        host_check([])("/", Headers({"host": "my.lan"}))


def test_other_origins_read_nothing_unless_let_in(client: httpx2.Client, http: httpx2.Client) -> None:
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,authorization"}
    let_in = client.options("/v1/chat/completions", headers={"Origin": ORIGIN, **asking})
    assert let_in.headers["access-control-allow-origin"] == ORIGIN
    stranger = client.options("/v1/chat/completions", headers={"Origin": "http://evil.example", **asking})
    assert "access-control-allow-origin" not in stranger.headers
    for origin in (ORIGIN, "http://evil.example"):  # off, unless it was asked for
        closed = http.options("/v1/chat/completions", headers={"Origin": origin, **asking})
        assert "access-control-allow-origin" not in closed.headers
        assert not closed.is_success


def test_wrong_paths_and_methods_are_answered_in_shape(client: httpx2.Client) -> None:
    missing = client.get("/v1/embeddings")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = client.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert client.get("/v1/messages").json()["type"] == "error"
    assert client.get("/page/../app.py").status_code == 404
    assert client.get("/page/%2e%2e/app.py").status_code == 404


# ---------------------------------------------------------------- what is told


def test_metrics_are_in_prometheus_format_and_count(client: httpx2.Client) -> None:
    before = _samples(client)
    usage = client.post("/v1/chat/completions", json=HELLO).json()["usage"]
    after = _samples(client)
    written = "localspec_generation_tokens_total"
    assert after[written] - before[written] >= usage["completion_tokens"]
    path = 'localspec_http_requests_total{path="/v1/chat/completions",status="200"}'
    assert after[path] == before.get(path, 0.0) + 1
    first = "localspec_time_to_first_token_seconds_count"
    assert after[first] == before[first] + 1
    assert after["localspec_requests_running"] == 0


def _samples(client: httpx2.Client) -> dict[str, float]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'[a-z_]+(\{([a-z_]+="[^"]*",?)+\})? [0-9.e+-]+', line) for line in lines)
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_the_status_names_what_is_loaded(client: httpx2.Client) -> None:
    status = client.get("/status").json()
    assert status["target"] == "localspec tiny target"
    assert status["batch"]["num_slots"] == 1
    assert status["plain_ms"] > 0


def test_the_description_names_every_path_that_writes(client: httpx2.Client) -> None:
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) > {"/v1/chat/completions", "/v1/responses", "/v1/messages"}
    text = json.dumps(described)
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert references <= set(described["components"]["schemas"])


# ---------------------------------------------------------------- the end


@contextmanager
def on_its_own(pair: Pair) -> Iterator[tuple[Served, httpx2.Client]]:
    """A server that a test may break."""
    with (
        serving(pair, BatchSettings(parallel=1), ServerSettings(names=("tiny",))) as server,
        httpx2.Client(base_url=server.address, timeout=LONG_S) as client,
    ):
        yield server, client


def test_health_is_bad_once_nobody_is_let_in(served_pair: Pair) -> None:
    with on_its_own(served_pair) as (server, client):
        assert client.get("/health").json() == {"status": "ok"}
        server.program.batch.close()
        _is_out_of_work(client)


def test_health_is_bad_while_running_answers_get_their_time(served_pair: Pair) -> None:
    with on_its_own(served_pair) as (server, client), ThreadPoolExecutor() as pool:
        asked = pool.submit(client.post, "/v1/completions", json={**ENDLESS, "max_tokens": 300})
        wait_until(lambda: server.num_busy == 1)
        closing = pool.submit(server.program.batch.close, drain_s=LONG_S)
        wait_until(lambda: not server.program.batch.is_working)
        assert client.get("/health").status_code == 503
        assert asked.result().json()["usage"]["completion_tokens"] == 300
        closing.result()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_health_is_bad_once_the_engine_is_broken_and_nobody_waits_for_it(
    served_pair: Pair, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    def end() -> bool:
        raise SystemExit  # no Exception, so the batch does not go on after it

    with on_its_own(served_pair) as (server, client):
        monkeypatch.setattr(server.program.batch, "_wait", end)
        response = client.post("/v1/completions", json={**ENDLESS, "stream": streaming})
        assert "shutting down" in response.text
        assert response.status_code == (200 if streaming else 503)
        _is_out_of_work(client)


def _is_out_of_work(client: httpx2.Client) -> None:
    """Whoever asks is told so; the counts can still be had."""
    response = client.get("/health")
    assert response.status_code == 503 and response.json()["error"]["code"] == "not_working"
    response = client.post("/v1/chat/completions", json=HELLO)
    assert response.status_code == 503 and "shutting down" in response.json()["error"]["message"]
    assert client.get("/metrics").is_success


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("drain", "whole"), [("60", True), ("0.2", False)])
def test_a_server_that_is_told_to_stop_finishes_what_runs(root: Path, drain: str, whole: bool) -> None:
    command = [sys.executable, "cli.py", "serve", "--backend", "llamacpp", "--port", "0", "--drain", drain]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if "is served at" in line)
            address = re.findall(r"http://\S+?(?=/v1)", line)[0]
            asked = {**ENDLESS, "max_tokens": 200 if whole else 1500, "stream": True}
            with httpx2.stream("POST", f"{address}/v1/completions", json=asked, timeout=60) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = _until_the_end(lines)
            assert ("data: [DONE]" in rest) == whole
            assert process.wait(60) == 0
        finally:
            process.kill()


def _until_the_end(lines: Iterator[str]) -> list[str]:
    rest: list[str] = []
    try:
        rest += lines
    except httpx2.TransportError:  # cut off, which is what the other test wants
        pass
    return rest
