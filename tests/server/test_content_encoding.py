"""Bodies that come compressed."""

import gzip
import json
import tracemalloc
import zlib

import pytest

from pacellm.errors import RequestError, UnsupportedEncoding
from pacellm.server import content_encoding
from pacellm.server.content_encoding import decoder_of
from tests.server.conftest import NAME

BODY = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}).encode()
LONG = b"".join(b"%d," % number for number in range(200_000))


def bare(data):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKED = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZIP": gzip.compress,
    "gzip, identity": gzip.compress,
    "deflate": zlib.compress,
    "identity": bytes,
    "": bytes,
}


def read(name, data, size):
    decoder = decoder_of(name)
    whole = b"".join(
        piece for start in range(0, len(data), size) for piece in decoder.pieces(data[start : start + size])
    )
    decoder.close()
    return whole


@pytest.mark.parametrize("size", [1, 7, 100_000, 10**9])
@pytest.mark.parametrize("text", [b"x", BODY, LONG, b"\0" * content_encoding._PIECE, b"a" * (3 * 2**18)],
                         ids=["one", "body", "long", "a piece", "pieces"])  # fmt: skip
def test_whole_again_however_it_was_cut(text, size):
    for name, pack in PACKED.items():
        assert read(name, pack(text), size) == text, name
    assert read("deflate", bare(text), size) == text
    assert read("gzip", gzip.compress(text) + gzip.compress(b"more"), size) == text + b"more"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("gzip", BODY),
        ("gzip", gzip.compress(BODY)[:-1]),
        ("gzip", gzip.compress(BODY) + b"xy"),
        ("gzip", gzip.compress(BODY)[:-8] + b"12345678"),
        ("gzip", b"\x1f"),
        ("gzip", zlib.compress(BODY)),
        ("deflate", zlib.compress(BODY) + b"xy"),
        ("deflate", zlib.compress(BODY)[:-1]),
        ("deflate", BODY),
    ],
    ids=["no gzip", "cut", "more behind", "sums", "one byte", "zlib", "zlib, more", "zlib, cut", "no zlib"],
)
def test_damaged(live, name, data):
    for size in (1, 10**9):
        with pytest.raises(RequestError):
            read(name, data, size)
    answer = live.http.post("/v1/chat/completions", content=data, headers={"Content-Encoding": name})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "Content-Encoding", "invalid_encoding")


@pytest.mark.parametrize("name", ["br", "zstd", "gzip, gzip", "gzip, br", "compress", "é"])
def test_other_encodings(live, name):
    with pytest.raises(UnsupportedEncoding):
        decoder_of(name)
    answer = live.http.post("/v1/chat/completions", content=BODY, headers={"Content-Encoding": name.encode()})
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip, deflate, identity")
    assert "gzip" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", PACKED)
def test_every_body_may_be_packed(live, name):
    headers = {"Content-Encoding": name.encode()}
    answer = live.http.post("/v1/chat/completions", content=PACKED[name](BODY), headers=headers)
    assert answer.status_code == 200, answer.text
    for path, body in (("/tokenize", b'{"prompt": "x"}'), ("/v1/sessions", b"{}"), ("/v1/sessions", b"")):
        packed = PACKED[name](body) if body else b""
        assert live.http.post(path, content=packed, headers=headers).status_code in (200, 201)


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_bomb_is_refused_before_it_is_unpacked(live, pack):
    bomb = pack(b"\0" * (200 * 2**20))
    assert len(bomb) < live.service.settings.max_body_bytes
    name = "gzip" if pack is gzip.compress else "deflate"
    tracemalloc.start()
    try:
        answer = live.http.post("/v1/chat/completions", content=bomb, headers={"Content-Encoding": name})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer.status_code == 413
    assert peak < 8 * 2**20  # with the client's copies of what it sent
    assert live.service.bodies.num_bytes == 0
    assert live.http.get("/health").status_code == 200
