"""The page at `/`: what it is told, and what a browser makes of it."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time

import pytest

pytest.importorskip("fastapi")
from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

import hf_paged_dashboard
from hf_paged.server.messages import BlockGroup
from hf_paged_dashboard.routes import PAGE, policy
from hf_paged_dashboard.state import runs
from hf_paged_dashboard.window import Counts, Times
from traffic import Traffic


@pytest.fixture
def traffic():
    return Traffic(hf_paged_dashboard)


def state(traffic):
    response = traffic.client.get("/dashboard/state")
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    return response.json()


# ------------------------------------------------------------------------------------------------------------ the state


def test_requests_that_run_come_before_those_that_wait(traffic):
    waiting = traffic.start("w", max_tokens=None)
    running, prefilling = traffic.start("r"), traffic.start("p")
    traffic.bring(running, 3, cached=8)
    traffic.report(running=["r", "p"], waiting=["w"])
    found = state(traffic)
    assert [one["id"] for one in found["requests"]][2] == waiting.request_id
    assert {one["id"]: one["state"] for one in found["requests"]} == {"r": "running", "p": "running", "w": "waiting"}
    assert found["counts"] == {"running": 2, "waiting": 1}
    (one,) = [one for one in found["requests"] if one["id"] == "r"]
    assert (one["prompt"], one["cached"], one["output"], one["max"]) == (10, 8, 3, 5)
    assert one["ttft"] == pytest.approx(running.time_to_first_token)
    assert next(one for one in found["requests"] if one["id"] == "p")["ttft"] is None
    assert prefilling.output_tokens == 0


def test_a_crowd_is_counted_in_full_and_listed_in_part(traffic):
    for index in range(250):
        traffic.start(f"r{index}")
    found = state(traffic)
    assert (found["counts"]["waiting"], len(found["requests"])) == (250, 200)


def test_looking_has_the_engines_send_their_blocks(traffic):
    asked = []
    traffic.stats.on_watch = asked.append
    traffic.report(groups=[BlockGroup(None, 100, 75)])
    (group,) = state(traffic)["engines"][0]["groups"]
    assert group == {"window": None, "num_blocks": 100, "num_free": 75, "blocks": None}
    assert asked == [5.0]
    full = BlockGroup(None, 12, 7, {"a": [3, 1, 2, 9], "b": [2, 4, 7]})
    sliding = BlockGroup(512, 6, 3, {"a": [0, 0, 2, 1], "b": [0, 0, 5]})
    traffic.report(replica=1, running=["a", "b"], groups=[full, sliding], num_blocks=18)
    first, second = state(traffic)["engines"]
    assert (first["replica"], second["replica"], second["num_blocks"]) == (0, 1, 18)
    assert [(one["window"], one["num_blocks"], one["num_free"]) for one in second["groups"]] == [
        (None, 12, 7),
        (512, 6, 3),
    ]
    assert [one["blocks"] for one in second["groups"]] == [
        {"a": [[1, 3], [9, 1]], "b": [[2, 1], [4, 1], [7, 1]]},
        {"a": [[1, 2]], "b": [[5, 1]]},  # without the null block
    ]


def test_block_ids_become_stretches():
    assert runs([]) == []
    assert runs([5, 4, 6, 6, 0, 9]) == [[4, 3], [9, 1]]


def test_totals_and_waiting_times(traffic):
    assert state(traffic)["latency"] == {"ttft": None, "inter_token": None, "e2e": None}
    record = traffic.start("a")
    traffic.bring(record, 1)
    traffic.bring(record, 2)
    traffic.end(record)
    traffic.stats.refused("queue_full")
    traffic.report(preemptions=2, prefix_queries=100, prefix_hits=25)
    found = state(traffic)
    totals = found["totals"]
    assert (totals["output_tokens"], totals["preemptions"], totals["prefix_hits"]) == (3, 2, 25)
    assert (totals["finished"], totals["refused"]) == ({"stop": 1}, {"queue_full": 1})
    assert found["requests"] == []
    assert found["latency"]["ttft"][0] == pytest.approx(record.time_to_first_token, rel=0.05)
    assert all(len(figures) == 3 for figures in found["latency"].values())
    assert (found["model"], found["phase"]) == ("tiny", "ready")


# ---------------------------------------------------------------------------------------------------------- its windows


def test_counts_of_the_last_seconds():
    now = [100.4]
    counts = Counts(3, lambda: now[0])
    counts.add(5)
    counts.add(2)
    assert counts.series() == [0, 0, 0]  # the second that runs isn't over
    now[0] = 101.0
    counts.add(1)
    now[0] = 102.9
    assert counts.series() == [0, 7, 1]
    now[0] = 1000.0
    assert counts.series() == [0, 0, 0]
    assert not counts._kept


def test_percentiles_of_the_last_seconds():
    now = [100.0]
    times = Times(10, lambda: now[0])
    assert times.percentiles(0.5) is None
    for milliseconds in range(1, 1001):
        times.add(milliseconds / 1000)
    middle, high = times.percentiles(0.5, 0.99)
    assert middle == pytest.approx(0.5, rel=0.05)
    assert high == pytest.approx(0.99, rel=0.05)
    now[0] = 105.0
    times.add(2.0, count=100_000)
    assert times.percentiles(0.5)[0] == pytest.approx(2.0, rel=0.05)
    now[0] = 110.0
    assert times.percentiles(0.01)[0] == pytest.approx(2.0, rel=0.05)  # the others are forgotten
    now[0] = 200.0
    assert times.percentiles(0.5) is None
    times.add(0.0)  # two tokens at once
    assert times.percentiles(0.5)[0] < 1e-5


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_fetches_nothing_from_outside(traffic):
    response = traffic.client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    html = response.text
    addresses = set(re.findall(r"https?://[^\s'\"<>)]+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.findall(r"<(?:link|script|img|iframe)[^>]+(?:src|href)=[\"'](?!data:)", html)
    assert not re.search(r"@import|url\((?!data:)", html)


def test_the_policy_holds_for_the_page_as_it_is():
    html = PAGE.read_text()
    assert policy(html) != policy(html.replace('"use strict";', '"use strict"; '))
    assert " style=" not in html  # the policy would block it
    assert not re.search(r"<[^>]+ on\w+=", html)


def test_ids_from_clients_are_never_markup():
    script = PAGE.read_text().split("<script>")[1]
    for line in [line for line in script.splitlines() if "innerHTML" in line]:
        assert "${" not in line
        assert "+" not in line


# ----------------------------------------------------------------------------------------------------------- a browser


class Live:
    """The page served on a port, over traffic, with an API that answers the box."""

    def __init__(self):
        import uvicorn

        self.traffic = Traffic(hf_paged_dashboard)
        self.bodies = []
        for path in ("/v1/chat/completions", "/v1/completions"):
            self.traffic.app.add_api_route(path, self.answer, methods=["POST"])
        config = uvicorn.Config(self.traffic.app, port=0, log_level="error")
        self.server = uvicorn.Server(config)

    async def answer(self, request: Request):
        body = await request.json()
        self.bodies.append(body)
        if body["max_tokens"] == 1:
            return JSONResponse({"error": {"message": "one is too few"}}, 400)

        async def events():
            for word in ("Tidal ", "locking <b>", "it is."):
                key = {"delta": {"content": word}} if "messages" in body else {"text": word}
                choice = {"index": 0, "finish_reason": None, **key}
                yield f"data: {json.dumps({'choices': [choice], 'usage': None})}\n\n"
                await asyncio.sleep(0.01)
            yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': 3}})}\n\ndata: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 120
        while not self.server.started and time.monotonic() < deadline:
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/"
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(20)


def until(check, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
    return found


def busy(live):
    """Two requests that share a prefix, and one that waits with a name that looks like markup."""
    traffic = live.traffic
    a, b = traffic.start("first", prompt_tokens=40), traffic.start("second", prompt_tokens=48)
    traffic.start("<img src=x>", prompt_tokens=7)
    traffic.bring(a, 2, cached=0)
    traffic.bring(b, 1, cached=32)
    full = BlockGroup(None, 20, 16, {"first": [1, 2, 3], "second": [1, 2, 4]})
    sliding = BlockGroup(512, 10, 7, {"first": [0, 5, 2], "second": [0, 0, 7]})
    counts = {"num_blocks": 30, "preemptions": 3}
    traffic.report(running=["first", "second"], waiting=["<img src=x>"], groups=[full, sliding], **counts)


PIXEL = """
    const [group, block, share] = arguments, index = block - 1;
    const {canvas, side, columns} = [...maps.values()][group], ratio = canvas.width / canvas.clientWidth;
    const x = ((index % columns) + share) * side * ratio, y = (Math.floor(index / columns) + 0.45) * side * ratio;
    return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3).join();
"""


def test_the_page_shows_what_happens(browser):
    with Live() as live:
        busy(live)
        browser.get(live.url)

        def text(name):
            return browser.execute_script("return document.getElementById(arguments[0]).textContent", name)

        until(lambda: text("running") == "2")
        assert (text("waiting"), text("preemptions"), text("model"), text("phase")) == ("1", "3", "tiny", "ready")
        rows = browser.execute_script("return [...document.querySelectorAll('#requests tr')].map(row => row.innerText)")
        assert [row.split()[0] for row in rows] == ["first", "second", "<img"]
        assert "waiting" in rows[2]
        assert not browser.execute_script("return document.querySelectorAll('img').length")
        assert (text("usage"), text("usage-note")) == ("23.3%", "7 of 30")
        assert captions(browser) == [
            "full attention · 20 blocks of 16 tokens · 4 in use · 2 shared",
            "window of 512 · 10 blocks of 16 tokens · 3 in use · 0 shared",
        ]
        # Block 1 shows both of its holders; 3 and 4 one each; 5 is free.
        left, right = (browser.execute_script(PIXEL, 0, 1, share) for share in (0.25, 0.65))
        own, other, free = (browser.execute_script(PIXEL, 0, block, 0.45) for block in (3, 4, 5))
        assert left == own
        assert right == other
        assert len({own, other, free}) == 3
        # The other group's blocks are others: 5 and 2 are the first one's, 7 the second's, 4 is free.
        assert [browser.execute_script(PIXEL, 1, block, 0.45) for block in (5, 2, 7, 4)] == [own, own, other, free]
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        for record in list(live.traffic.stats.running.values()):
            live.traffic.end(record)
        live.traffic.report(groups=[BlockGroup(None, 20, 20, {}), BlockGroup(512, 10, 10, {})], num_blocks=30)
        until(lambda: text("running") == "0")


def captions(browser):
    return browser.execute_script("return [...document.querySelectorAll('#maps p')].map(text => text.textContent)")


def test_each_replica_has_its_own_maps(browser):
    with Live() as live:
        groups = [BlockGroup(None, 20, 20), BlockGroup(512, 10, 10)]
        for replica in (1, 0):
            live.traffic.report(replica=replica, groups=groups, num_blocks=30)
        browser.get(live.url)
        names = ["full attention", "window of 512"]
        both = [f"Replica {replica} · {name}" for replica in (0, 1) for name in names]
        until(lambda: [" · ".join(text.split(" · ")[:2]) for text in captions(browser)] == both)
        live.traffic.stats.restarted(0, "it was killed")
        until(lambda: [text.split(" · ")[0] for text in captions(browser)] == names)
        live.traffic.report(replica=0, groups=groups, num_blocks=30)  # comes back to its place
        until(lambda: [" · ".join(text.split(" · ")[:2]) for text in captions(browser)] == both)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_schemes(browser, scheme):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    with Live() as live:
        busy(live)
        browser.get(live.url)
        until(lambda: browser.execute_script("return document.getElementById('running').textContent") == "2")
        pairs = browser.execute_script("""
            const backed = element => {
                for (; element; element = element.parentElement) {
                    const found = getComputedStyle(element).backgroundColor;
                    if (!/rgba\\(.*, 0\\)/.test(found)) return found;
                }
            };
            const tile = [".tile .label", ".tile .value", ".tile .note"];
            return ["h1", ".model", ...tile, "th", "td", ".legend", "textarea", "button"]
                .map(path => document.querySelector(path))
                .map(element => [getComputedStyle(element).color, backed(element)]);
        """)
        for ink, paper in pairs:
            assert contrast(ink, paper) >= 4.5, (ink, paper)  # WCAG AA
        assert (luminance(pairs[0][1]) > 0.5) == (scheme == "light")


def test_the_box_streams_an_answer(browser):
    with Live() as live:
        browser.get(live.url.replace("//", "//any:key@"))  # as a page behind an API key may be opened
        until(lambda: browser.execute_script("return state !== null"))
        for mode, expected in (("chat", "messages"), ("completion", "prompt")):
            browser.execute_script("document.getElementById('mode').value = arguments[0]", mode)
            browser.execute_script("document.getElementById('try').requestSubmit()")
            said = "return document.getElementById('said').textContent"
            until(lambda: "3 tokens" in browser.execute_script(said))
            answer = browser.execute_script("return document.getElementById('answer').textContent")
            assert answer == "Tidal locking <b>it is."
            assert expected in live.bodies[-1]
            assert live.bodies[-1]["stream"]
        browser.execute_script("document.getElementById('most').value = 1")
        browser.execute_script("document.getElementById('try').requestSubmit()")
        until(
            lambda: browser.execute_script("return document.getElementById('answer').textContent") == "one is too few"
        )


def test_a_server_that_is_gone_is_said_to_be(browser):
    with Live() as live:
        browser.get(live.url)
        until(lambda: browser.execute_script("return state !== null"))
    until(lambda: browser.execute_script("return document.getElementById('phase').textContent") == "unreachable")


def luminance(color):
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
