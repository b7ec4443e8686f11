from __future__ import annotations

import http.client
import json
from collections.abc import Iterator

import openai
import pytest
from serving import Running, serve

from mbq_runtime import Engine
from mbq_runtime.addresses import is_loopback
from mbq_runtime.server import auth

KEY = "sesame-ö"
PROTECTED = ("/metrics", "/live", "/v1/models", "/v1/models/tiny", "/v1/chat/completions", "/v1/completions", "/no")


@pytest.fixture(scope="module")
def keyed(loaded: Engine) -> Iterator[Running]:
    with serve(loaded, api_key=KEY) as found:
        yield found


def status(running: Running, path: str, headers: dict[str, str | bytes], method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.read(2000).decode()
    connection.close()
    return found


@pytest.mark.parametrize("path", PROTECTED)
@pytest.mark.parametrize(
    "authorization", [None, "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, "Bearer sesame-", f"Bearer {KEY}x"]
)
def test_wrong_key(keyed: Running, path: str, authorization: str | None) -> None:
    headers: dict[str, str | bytes] = {} if authorization is None else {"Authorization": authorization.encode()}
    found, body = status(keyed, path, headers)
    assert found == 401
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


def test_right_key(keyed: Running) -> None:
    for path in ("/metrics", "/v1/models"):
        assert status(keyed, path, {"Authorization": f"Bearer {KEY}".encode()})[0] == 200


@pytest.mark.parametrize("key", [" sesame\t", "sesame-à", "Å-sesame-Å", "à"])
def test_a_key_with_spaces_or_with_bytes_that_look_like_some(engine: Engine, key: str) -> None:
    with serve(engine, api_key=key) as running:
        for headers in ({"Authorization": f"Bearer {key}".encode()}, {"X-Api-Key": key.encode()}):
            assert status(running, "/v1/models", {**headers})[0] == 200
        assert status(running, "/v1/models", {"X-Api-Key": key.encode() + b"x"})[0] == 401


def test_page_and_health_tell_nothing_of_replies_and_need_no_key(keyed: Running) -> None:
    assert status(keyed, "/health", {}) == (200, '{"status":"ok","ceiling_bits":8.0}')
    assert status(keyed, "/", {})[0] == 200


def test_the_client_is_told(engine: Engine) -> None:
    with serve(engine, api_key="open") as running:
        right = openai.OpenAI(base_url=f"{running.url}/v1", api_key="open", max_retries=0)
        assert right.models.list().data[0].id == "tiny"
        wrong = openai.OpenAI(base_url=f"{running.url}/v1", api_key="shut", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
            wrong.models.list()


def test_keys_are_compared_in_constant_time_and_at_one_length(keyed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        seen.append((a, b))
        return a == b

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    for guess in ("", "s", "sesame", "x" * 5000):
        assert status(keyed, "/v1/models", {"Authorization": f"Bearer {guess}"})[0] == 401
    assert len(seen) == 4
    assert {len(a) for a, _ in seen} == {len(b) for _, b in seen} == {32}
    assert KEY.encode() not in {part for pair in seen for part in pair}


@pytest.mark.parametrize(
    ("host", "allowed"),
    [("localhost", True), ("127.0.0.1:80", True), ("[::1]:99", True), ("evil.example", False), ("10.0.0.1", False)],
)
def test_a_local_server_answers_to_local_names_only(running: Running, host: str, allowed: bool) -> None:
    assert status(running, "/v1/models", {"Host": host})[0] == (200 if allowed else 403)


def test_other_sites_pages_cannot_make_it_work(running: Running) -> None:
    host = f"127.0.0.1:{running.port}"
    for origin, expected in (("https://evil.example", 403), ("null", 403), (f"http://{host}", 400)):
        found, _ = status(running, "/v1/completions", {"Origin": origin, "Host": host}, "POST")
        assert found == expected, origin
    assert not running.server.worker.running


def test_a_key_makes_names_and_origins_irrelevant(keyed: Running) -> None:
    headers: dict[str, str | bytes] = {
        "Authorization": f"Bearer {KEY}".encode(),
        "Host": "board.example",
        "Origin": "https://chat.example",
    }
    assert status(keyed, "/v1/models", headers)[0] == 200
    assert status(keyed, "/v1/completions", headers, "POST")[0] == 400  # no body: let in, then refused


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.1.2.3", True), ("::1", True), ("0.0.0.0", False), ("192.168.1.5", False), ("", False)],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def preflight(running: Running, origin: str) -> tuple[int, str | None]:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    connection.request("OPTIONS", "/v1/chat/completions", headers=asked)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, answer.headers["Access-Control-Allow-Origin"]


@pytest.mark.parametrize("key", [None, KEY])
def test_pages_of_allowed_origins_can_use_the_server(engine: Engine, key: str | None) -> None:
    page = "https://chat.example"
    with serve(engine, api_key=key, origins=(page,)) as running:
        assert preflight(running, page) == (200, page)  # browsers send no key with it
        assert preflight(running, "https://evil.example")[1] is None
        headers: dict[str, str | bytes] = {"Origin": page, "Authorization": f"Bearer {key}".encode()}
        assert status(running, "/v1/completions", headers, "POST")[0] == 400  # no body: let in, then refused
        if key:
            assert status(running, "/v1/completions", {"Origin": page}, "POST")[0] == 401
        else:
            assert status(running, "/v1/completions", {"Origin": "https://evil.example"}, "POST")[0] == 403


def test_a_page_that_is_refused_is_told_what_helps(running: Running) -> None:
    found, body = status(running, "/v1/completions", {"Origin": "https://chat.example"}, "POST")
    assert found == 403
    assert "--allow-origin https://chat.example" in body


@pytest.mark.parametrize("key", [None, KEY])
def test_a_preflight_that_is_refused_is_told_what_helps(engine: Engine, key: str | None) -> None:
    with serve(engine, api_key=key) as running:
        found, body = status(running, "/v1/completions", {"Origin": "https://chat.example"}, "OPTIONS")
    assert found == 403
    assert "--allow-origin https://chat.example" in body
