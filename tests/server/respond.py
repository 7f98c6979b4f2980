"""Requests to the Responses API."""

import json

from tests.server.conftest import NAME

USUAL = {"model": NAME, "temperature": 0, "max_output_tokens": 24}


def create(live, text, **changes):
    return live.client.responses.create(input=text, **{**USUAL, **changes})


def post(live, body, **headers):
    return live.http.post("/v1/responses", json={**USUAL, "input": "hi", **body}, headers=headers)


def sessions(live):
    return [item["id"] for item in live.sessions()]


def raw_events(response):
    lines = list(response.iter_lines())
    data = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert [line[7:] for line in lines if line.startswith("event: ")] == [event["type"] for event in data]
    return data
