"""The page's files, as they are sent. tests/page looks at it in a browser."""

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

from pacellm.config import EngineConfig
from pacellm.server.auth import Keys
from pacellm.server.page.route import known
from tests.server.conftest import start

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "server/page/static"
OWN = [path for path in sorted(STATIC.glob("*")) if path.is_file()]


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_and_all_that_it_names(live, path):
    answer = live.http.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?:", policy)
    names = re.findall(r'(?:src|href)="(page/[^"]+)"', answer.text)
    assert len(names) >= 3
    for name in names:
        assert live.http.get(f"/{name}").status_code == 200, name
    assert live.http.head(path).status_code == 200


def test_files_are_sent_once(live):
    first = live.http.get("/page/app.js")
    assert first.headers["content-type"] == "text/javascript; charset=utf-8"
    assert first.headers["x-content-type-options"] == "nosniff"
    again = live.http.get("/page/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for name in ("nothing.js", "", "../route.py", "..%2froute.py", "vendor"):
        assert live.http.get(f"/page/{name}").status_code == 404


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_nothing_is_from_elsewhere_and_no_text_becomes_markup(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?<!=\")https?://(?!www\.w3\.org/2000/svg)", text)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|localStorage", text
    )
    if path.suffix == ".html":
        assert not re.search(r"\son\w+=|<style|\sstyle=|<script(?![^>]*\ssrc=)", text)
    for module in re.findall(r'from "\./([^"]+)"', text):
        assert (STATIC / module).is_file()


def test_every_file_is_in_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for name in known():
        depth = name.count("/")
        assert any(fnmatch.fnmatch(f"static/{name}", one) and one.count("/") == depth + 1
                   for one in patterns["pacellm.server.page"]), name  # fmt: skip


def test_links_lead_to_the_page_and_not_to_the_api(live):
    headers = {"Sec-Fetch-Site": "cross-site", "Origin": "https://example.org"}
    assert live.http.get("/", headers=headers).status_code == 200
    assert live.http.get("/v1/sessions", headers=headers).json()["error"]["code"] == "foreign_origin"


def test_it_is_public_and_can_be_switched_off():
    config = EngineConfig(kv_cache_memory=2**28)
    with start(config, Keys({"key-of-a": "a"})) as server:
        assert server.http.get("/").status_code == 200
        assert server.http.get("/page/app.js").status_code == 200
        assert server.http.get("/openapi.json").status_code == 401
    with start(config, page=False) as server:
        for path in ("/", "/docs", "/page/app.js"):
            assert server.http.get(path).status_code == 404
