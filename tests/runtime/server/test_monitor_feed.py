"""The metrics, and the stream behind the monitor page."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import openai
from prometheus_client.parser import text_string_to_metric_families
from serving import Running, wait_for

from mbq_runtime.control.events import Event
from mbq_runtime.sensing.readings import Readings
from mbq_runtime.server import monitor_feed


def get(running: Running, path: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    connection.request("GET", path)
    return connection.getresponse()


def metrics(running: Running) -> dict[tuple[str, ...], float]:
    answer = get(running, "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.read().decode())
        for sample in family.samples
    }


def test_metrics_show_the_governor_s_status(running: Running) -> None:
    running.governor.set(
        avg_bits=4.5, tokens_per_s=9.25, avg_bits_used=4.47, energy_j_per_token=0.5, temp_c=71.5, throttle_temp_c=80.0,
        heat_throttled=False, undervoltage=True, power_w=4.75, battery_fraction=0.5, discharging=True,
    )  # fmt: skip
    found = metrics(running)
    expected = {
        "mbq_avg_bits": 4.5, "mbq_avg_bits_used": 4.47, "mbq_tokens_per_second": 9.25,
        "mbq_energy_joules_per_token": 0.5, "mbq_temperature_celsius": 71.5, "mbq_throttle_temperature_celsius": 80.0,
        "mbq_heat_throttled": 0.0, "mbq_undervoltage": 1.0, "mbq_power_watts": 4.75, "mbq_battery_ratio": 0.5,
        "mbq_discharging": 1.0, "mbq_replies_running": 0.0, "mbq_requests_waiting": 0.0, "mbq_queue_limit": 16.0,
    }  # fmt: skip
    assert {name: found[(name,)] for name in expected} == expected
    assert found[("mbq_threads",)] == running.bounded.threads
    assert found[("process_resident_memory_bytes",)] > 1e6


def test_unknown_readings_are_absent_not_zero(running: Running) -> None:
    names = {name for name, *_ in metrics(running)}
    assert "mbq_avg_bits" in names
    assert not names & {
        "mbq_temperature_celsius", "mbq_power_watts", "mbq_heat_throttled", "mbq_energy_joules_per_token",
        "mbq_tokens_per_second", "mbq_battery_ratio",
    }  # fmt: skip


def test_metrics_count_requests_and_tokens(running: Running, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt="xA", temperature=0, max_tokens=5)
    get(running, "/v1/models/huge").read()
    get(running, "/somewhere/else").read()
    found = metrics(running)
    assert found[("mbq_requests_total", "/v1/completions", "200")] == 1
    assert found[("mbq_requests_total", "other", "404")] == 2  # a client cannot make labels
    assert found[("mbq_prompt_tokens_total",)] == 2
    assert found[("mbq_generated_tokens_total",)] == 5
    assert found[("mbq_time_to_first_token_seconds_count",)] == 1


def news(running: Running) -> Iterator[dict[str, Any]]:
    with get(running, "/live") as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        for line in answer:
            if line.strip():
                yield json.loads(line.removeprefix(b"data: "))


def test_the_stream_begins_with_the_past_and_goes_on(running: Running, client: openai.OpenAI) -> None:
    told = news(running)
    first = next(told)
    assert first["model"] == "tiny"
    running.governor.set(avg_bits=6.0, reason="heat: 77 C", temp_c=77.0, tokens_per_s=3.5)
    running.feed.add_event(Event(1e9, 8.0, 6.0, "heat: 77 C", Readings(0.0)))
    events, sample = [], first["samples"][-1]
    for later in told:
        events += later["events"]
        (sample,) = later["samples"]  # one a second, each told once
        if sample["temp_c"] == 77.0 and events:
            break
    assert [(e["time"], e["old"], e["new"], e["reason"]) for e in events] == [(1e9, 8.0, 6.0, "heat: 77 C")]
    assert (sample["avg_bits"], sample["tokens_per_s"], sample["power_w"]) == (6.0, 3.5, None)
    assert abs(sample["time"] - time.time()) < 60
    late = next(news(running))
    assert [e["reason"] for e in late["events"]] == ["heat: 77 C"]
    assert len(late["samples"]) >= 2


def test_a_request_s_own_bits_are_shown_as_such(running: Running) -> None:
    running.governor.set(avg_bits=6.0, reason="heat: 77 C")
    with running.bounded.within_bounds(4.0, 4.0):
        asked = running.server._sample()
    after = running.server._sample()
    assert (asked["avg_bits"], asked["reason"]) == (4.0, "set by the request")
    assert (after["avg_bits"], after["reason"]) == (6.0, "heat: 77 C")


def test_the_past_is_bounded(running: Running) -> None:
    for i in range(500):
        running.feed.add_event(Event(float(i), 8.0, 6.0, "heat", Readings(0.0)))
        running.feed._samples.append({"n": i, "time": float(i)})
    wait_for(lambda: len(running.feed._events) > 0)
    assert len(running.feed._samples) == monitor_feed._SAMPLES
    assert [e["time"] for e in running.feed._events] == [float(i) for i in range(500 - monitor_feed._EVENTS, 500)]
