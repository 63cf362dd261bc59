"""/docs: a page that needs nothing but this server, wherever a proxy shows it."""

from __future__ import annotations

import base64
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin

import pytest
import uvicorn
from fastapi import FastAPI
from server import fakes

from hf_paged._version import __version__

SCRIPT, STYLE = "text/javascript", "text/css"


class Page(HTMLParser):
    """What a page asks for, by kind, and the code in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []
        self.attributes: set[str] = set()
        self.within: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.attributes |= found.keys()
        self._open = tag
        if tag == "script":
            self.asked.append((SCRIPT, found["src"]))
        elif tag == "link" and found["rel"] == "stylesheet":
            self.asked.append((STYLE, found["href"]))

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style") and data.strip():
            self.within.append(data)


def made(**options: object) -> FastAPI:
    return fakes.application(fakes.FakeEngine(), **options)


@pytest.mark.parametrize("root", ["", "/below", "/further/below"])
def test_the_page_brings_along_what_it_asks_for(root: str) -> None:
    app, at = made(root_path=root), f"{root}/docs"
    page = fakes.call(app, "GET", at)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert not re.search("https?:|//", page.text)  # no other host
    found = Page(page.text)
    assert sorted(kind for kind, _ in found.asked) == [STYLE, SCRIPT, SCRIPT]
    for kind, address in found.asked:
        file = fakes.call(app, "GET", urljoin(at, address))
        assert (file.status_code, file.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        assert file.headers["x-content-type-options"] == "nosniff"
        assert file.content
    schema = urljoin(at, re.findall(r'url: "(.*?)"', fakes.call(app, "GET", urljoin(at, "docs/docs.js")).text)[0])
    assert fakes.call(app, "GET", schema).json()["info"]["title"] == "hf_paged"


def test_the_page_runs_the_servers_own_scripts_alone() -> None:
    response = fakes.call(made(), "GET", "/docs")
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert (page := Page(response.text)).within == []  # the policy would keep it from running
    assert not {name for name in page.attributes if name == "style" or name.startswith("on")}
    style = fakes.call(made(), "GET", "/docs/swagger-ui.css").text
    assert all(address.strip("\"'").startswith("data:") for address in re.findall(r"url\((.*?)\)", style))
    assert "@import" not in style


def test_there_are_no_other_pages_and_files() -> None:
    for path in ("/redoc", "/docs/oauth2-redirect", "/docs/docs.html", "/docs/docs.py", "/docs/%2e%2e%2fdocs.py"):
        assert fakes.call(made(), "GET", path).status_code == 404, path


def test_a_browser_opens_it_with_a_key() -> None:
    app = made(api_keys=("secret",), root_path="/below")
    asked = fakes.call(app, "GET", "/below/docs", headers={"Accept": "text/html"})
    assert (asked.status_code, asked.headers["www-authenticate"]) == (401, 'Basic realm="hf_paged"')
    headers = {"Authorization": "Basic " + base64.b64encode(b"me:secret").decode(), "Sec-Fetch-Site": "same-origin"}
    for path in ("/docs", "/docs/docs.js", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/openapi.json"):
        assert fakes.call(app, "GET", f"/below{path}").status_code == 401, path
        assert fakes.call(app, "GET", f"/below{path}", headers=headers).status_code == 200, path


# ----------------------------------------------------------------------------------------------------------- a browser


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Serves it in a thread; host and port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def until(check: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def test_a_browser_shows_the_api_and_calls_it(browser: Any) -> None:
    with listening(made(api_keys=("secret",), root_path="/below")) as address:
        browser.get(f"http://me:secret@{address}/below/docs")  # as its window for the password would
        browser.get_log("browser")
        browser.get(f"http://{address}/below/docs")

        def count(selector: str) -> int:
            return browser.execute_script("return document.querySelectorAll(arguments[0]).length", selector)

        def press(selector: str) -> None:
            until(lambda: count(selector))
            browser.execute_script("document.querySelector(arguments[0]).click()", selector)

        until(lambda: count(".opblock") > 9)
        press("[id$='version_version_get'] .opblock-summary-control")
        press(".try-out__btn")
        press(".execute")
        until(lambda: count(".live-responses-table"))
        shown = browser.execute_script("return document.querySelector('.live-responses-table').innerText")
        assert f'"version": "{__version__}"' in shown
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
