"""The observatory in Chromium: its numbers are the engine's, an expert shows its tokens, and traces are replayed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Live, serve

import flashmoe_mlx
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.research.traces.cache_design import CacheDesign
from flashmoe_mlx.research.traces.random_traces import zipf_trace
from flashmoe_mlx.research.traces.replay_page import write_replay_page
from flashmoe_mlx.research.traces.routing import coverage
from flashmoe_mlx.research.traces.simulator import replay

pytestmark = pytest.mark.browser
ASK = """async () => (await import("/web/api.js")).json("v1/chat/completions", {body: {
    model: "demo", messages: [{role: "user", content: "What is 17 plus 25?"}], max_tokens: 24, temperature: 0}})"""
NUMBERS = ".observatory .numbers"
LIT = """() => {
    const canvas = document.querySelector("canvas.grid");
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    let [blue, orange] = [0, 0];
    for (let i = 0; i < pixels.length; i += 4) {
        const [r, g, b] = pixels.subarray(i, i + 3);
        if (b > r + 60 && b > g + 20) blue++;
        if (r > b + 90 && r > g + 40) orange++;
    }
    return [blue, orange];
}"""


@pytest.fixture(scope="module")
def served(demo_pack: Path) -> Iterator[Live]:
    def reload(backend: str | None, experts_k: int | None) -> Any:
        return flashmoe_mlx.load(demo_pack, backend or "pread", experts_k)

    with serve(demo_pack, engine_options={"backend": "ram_hybrid", "budget_gib": 0.004}, reload=reload) as running:
        yield running


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab without errors and without requests to other machines."""
    context = browser.new_context(color_scheme="light", viewport={"width": 1200, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda request: problems.append(request.url) if "evil" in request.url else None)
    opened.on(
        "request",
        lambda request: (
            problems.append(request.url)
            if not request.url.startswith(("http://127.0.0.1", "file:", "data:", "blob:"))
            else None
        ),
    )
    yield opened
    context.close()
    assert problems == []


def test_the_live_view(served: Live, page: Any) -> None:
    page.goto(served.url)
    page.locator("#toggle-observatory").click()
    page.locator(".observatory .note", has_text="8 layers of 64 experts").wait_for()
    engine = served.service.worker.engine
    before = engine.store.stats()
    answer = page.evaluate(ASK)
    served.wait_idle()
    grown = engine.store.stats() - before
    page.locator(f'{NUMBERS}[data-requests="{grown.requests}"]').wait_for()
    blue, orange = page.evaluate(LIT)
    assert blue > 100
    assert orange > 100
    assert page.locator(NUMBERS).get_attribute("data-misses") == str(grown.misses)
    assert page.locator(NUMBERS).get_attribute("data-decoded") == str(answer["usage"]["completion_tokens"] - 1)

    page.locator("canvas.grid").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.locator(".expert h3", has_text="Layer 0, expert 0").wait_for()
    said = answer["choices"][0]["message"]
    text = (said.get("reasoning_content") or said["content"]).replace("\n", "↵")
    assert text[:4] in page.locator(".expert .tokens").inner_text().replace("\n", "")
    page.locator("summary", has_text="The grid as a table").click()
    page.locator(".observatory details tbody tr").nth(7).wait_for()
    assert page.locator(".observatory details tbody tr").count() == 8

    page.locator("#observatory-experts").fill("3")
    page.locator("#observatory-backend").select_option("pread")
    page.locator("button", has_text="Switch").click()
    page.locator(".observatory .note", has_text="3 for each token, served by pread").wait_for()
    assert page.locator(".runs td").all_inner_texts()[:2] == ["ram_hybrid", "10"]
    page.evaluate(ASK)
    page.locator(f"{NUMBERS}:not([data-requests='0'])").wait_for()
    page.locator("#toggle-observatory").click()
    page.wait_for_function("() => true")
    assert page.locator("canvas.grid").count() == 0


def test_the_settings_change_the_experts_per_token(served: Live, page: Any) -> None:
    page.goto(served.url)
    page.locator("#toggle-observatory").click()
    page.locator(".observatory .note", has_text="8 layers of 64 experts").wait_for()
    for experts, shown in ((2, "2 for each token"), (10, "10 for each token")):
        page.locator("#open-settings").click()
        page.locator("dialog").get_by_label("Experts per token").fill(str(experts))
        page.get_by_role("button", name="Save").click()
        page.locator(".observatory .note", has_text=shown).wait_for()
        page.locator("#notice").wait_for(state="hidden")
    assert served.service.engine.setup["experts_k"] == 10
    page.route("**/observatory/engine", lambda route: route.fulfill(status=409, json={"error": {"message": "busy"}}))
    page.locator("#open-settings").click()
    page.locator("dialog").get_by_label("Experts per token").fill("3")
    page.get_by_role("button", name="Save").click()
    page.locator("#notice", has_text="has not changed: busy").wait_for()


def test_a_replay_without_a_server(page: Any, tmp_path: Path) -> None:
    drawn = zipf_trace(60, 5, 32, 4, 1.0, seed=1)
    trace = RoutingTrace(drawn.experts, 32, 20, "made", "", record_bytes=1000)
    trace.save(tmp_path / "made.moetrace")
    write_replay_page(tmp_path / "made.moetrace", tmp_path / "out.html")
    page.goto(f"file://{tmp_path}/out.html")
    expected = replay(trace, CacheDesign("lru", 8))
    requests = expected.prefill.requests + expected.decode.requests
    page.locator("select[aria-label=Speed]").select_option("64")
    page.locator(f'{NUMBERS}[data-requests="{requests}"]').wait_for()
    misses = expected.prefill.misses + expected.decode.misses
    assert page.locator(NUMBERS).get_attribute("data-misses") == str(misses)
    sentence = page.locator(".observatory .note", has_text="Half of all choices").inner_text()
    half, most = (int(np.argmax(coverage(trace) >= share)) for share in (0.5, 0.9))
    assert f"the {half} most used experts of each layer, 90 % on {most}, of 32" in sentence
    page.locator("canvas.grid").click(position={"x": 3, "y": 3})
    page.locator(".expert h3", has_text="Layer 0, expert 0").wait_for()
    used = int((trace.experts[20:, 0] == 0).any(-1).sum())
    assert page.locator(".expert mark").count() == used
    for slots in (32, 5):
        page.locator("input[aria-label^=Experts]").fill(str(slots))
        found = replay(trace, CacheDesign("lru", slots))
        total = found.prefill.misses + found.decode.misses
        page.locator(f'{NUMBERS}[data-misses="{total}"]').wait_for()


def test_a_trace_is_opened_beside_the_live_view(served: Live, page: Any, tmp_path: Path) -> None:
    zipf_trace(30, 3, 16, 2, 1.0, seed=2).save(tmp_path / "made.moetrace")
    (tmp_path / "bad.moetrace").write_bytes((tmp_path / "made.moetrace").read_bytes()[:-5])
    page.goto(served.url)
    page.locator("#toggle-observatory").click()
    for name, text in (("bad.moetrace", "damaged"), ("made.moetrace", "3 layers of 16 experts")):
        page.locator("input[type=file]").set_input_files(tmp_path / name)
        page.locator(".observatory .note", has_text=text).wait_for()
    page.locator("button", has_text="Back to the live view").click()
    page.locator(".observatory .note", has_text="8 layers of 64 experts").wait_for()
