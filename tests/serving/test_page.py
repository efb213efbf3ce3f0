"""The page at `/`: its route and headers, and each task in a real browser."""

import base64
import hashlib
import re
import shutil
import subprocess
import threading
import time

import pytest
import uvicorn

from modernbert.pipelines import pipeline
from modernbert.pipelines.options import OPTIONS
from modernbert.serving import create_app
from tests.serving.browser import CHROMIUM, Browser

needs_browser = [
    pytest.mark.network,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
]
MARKUP = "<img src=x onerror=\"document.title='run'\"> <b>bold</b> & 'quoted' \N{GRINNING FACE} \u05d0"
TEXTS = {"sentence-embedding": "texts", "text-scoring": "texts", "question-answering": "context"}
TEXTS |= {"multiple-choice": "choices", "text-ranking": "documents"}  # the others have a field "text"
WITHOUT_THE_TEXT = {
    *("text-classification", "zero-shot-classification", "feature-extraction", "sparse-embedding", "late-interaction")
}


def start(app):
    """The app on a port of its own: its address, and what ends it."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]

    def end():
        server.should_exit = True
        thread.join()

    return f"http://127.0.0.1:{port}/", end


@pytest.fixture(scope="module")
def address(pipelines, heads):
    """Of a server with a model for each task."""
    generate = pipeline("text-generation", heads / "CausalLM", dtype="float32")
    sort = pipeline("zero-shot-classification", heads / "SequenceClassification", dtype="float32")
    url, end = start(create_app({"<i>generate</i>": generate, "sort": sort, **pipelines}, access_log=False))
    yield url
    end()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def page(browser, address):
    """Open the page for a task, on a screen of a width."""
    browser.complaints.clear()
    browser.requests.clear()

    def open_it(task, width=1280, dark=False):
        browser.screen(width, dark=dark)
        browser.open(f"{address}#{task}")
        browser.wait(f"document.getElementById('task').value === '{task}'")
        return browser

    yield open_it
    browser.run("sessionStorage.clear()")


def fill(page, **values):
    """Write into fields, and run by the keyboard."""
    for name, text in values.items():
        page.run(f"document.getElementById('field-{name}').focus()")
        page.write(text)
    page.press("Enter", control=True)


def answer(page):
    """What the page shows once there is an answer or an error: status, error, result."""
    page.wait("document.getElementById('facts').childElementCount || document.getElementById('problem').textContent")
    return [page.run(f"document.getElementById('{part}').innerText") for part in ("status", "problem", "result")]


def test_the_route_gives_a_page_that_loads_nothing_else(ask):
    reply = ask("/")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"""https?://|["'`(=]//|(?:src|srcset|action)=|@import|url\(""", reply.text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\son\w+=|\seval\(", reply.text)
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", reply.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


def test_it_knows_every_task_and_only_options_that_there_are(ask):
    text = ask("/").text
    blocks = dict(re.findall(r'^  "([a-z-]+)": \{ about: (.*?) \},$', text, re.MULTILINE | re.DOTALL))
    assert set(blocks) == set(OPTIONS)
    for task, block in blocks.items():
        chosen = re.findall(r'(?:check|choice|line|names|number)\("(\w+)"', block.split("options: ")[1])
        assert set(chosen) <= set(OPTIONS[task].__dataclass_fields__), task


class TestInABrowser:
    pytestmark = needs_browser

    @pytest.mark.parametrize("task", OPTIONS)
    def test_each_task_answers_its_example(self, page, address, task):
        shown = page(task, width=360)
        shown.run("document.querySelector('textarea').focus()")
        shown.press("Enter", control=True)
        status, problem, result = answer(shown)
        assert problem == ""
        assert status
        assert result.strip()
        facts = shown.run("document.getElementById('facts').innerText")
        assert re.search(r"Time\s+\d+ ms\s.*Tokens\s+\d+\s+Cut\s+nothing", facts, re.DOTALL), facts
        for width in (360, 1280):
            shown.screen(width)
            assert shown.run("document.documentElement.scrollWidth") <= width
        assert shown.complaints == []
        assert all(url.startswith((address, "data:", "about:")) for url in shown.requests)

    @pytest.mark.parametrize("task", OPTIONS)
    def test_markup_stays_text(self, page, task):
        shown = page(task)
        mask = " [MASK]" if task == "fill-mask" else ""
        fill(shown, **{TEXTS.get(task, "text"): f"{MARKUP} Anna lives in Paris.{mask}"})
        assert answer(shown)[1] == ""
        if task not in WITHOUT_THE_TEXT:
            bare = "result.querySelectorAll('small').forEach((one) => one.remove()), result.textContent"
            assert MARKUP in shown.run(bare)
        assert shown.run("document.querySelectorAll('main img, main b, main i, main script').length") == 0
        assert shown.run("document.title") == "modernbert"
        assert "&" in shown.run("document.getElementById('curl').textContent")
        assert shown.complaints == []

    def test_labels_and_names_of_models_stay_text(self, page):
        shown = page("zero-shot-classification")
        fill(shown, candidate_labels="<b>banking</b>, <img src=x>")
        assert "<b>banking</b>" in answer(shown)[2]
        shown = page("text-generation")
        assert shown.run("document.getElementById('model').value") == "<i>generate</i>"
        assert shown.run("document.querySelectorAll('main b, main i, main img').length") == 0

    def test_the_policy_refuses_markup_from_scripts(self, page):
        shown = page("fill-mask")
        with pytest.raises(RuntimeError, match="TrustedHTML"):
            shown.run("document.body.innerHTML = '<b>bold</b>'")

    def test_places_count_characters(self, page, pipelines):
        text = "\N{GRINNING FACE}\N{GRINNING FACE} Anna lives in Paris."
        shown = page("token-classification")
        fill(shown, text=text)
        answer(shown)
        script = "[...document.querySelectorAll('mark')].map((one) => one.firstChild.textContent)"
        found, wanted, done = pipelines["tag"](text, aggregation_strategy="simple"), [], 0
        for one in found:
            if one["start"] >= done:  # tokens of one character have the same place
                wanted.append(text[one["start"] : one["end"]].lstrip())
                done = one["end"]
        assert wanted[0] == text[0]
        assert shown.run(script) == wanted

    def test_errors_are_the_servers(self, page):
        shown = page("fill-mask")
        fill(shown, text="<b>nothing</b> to fill")
        status, problem, result = answer(shown)
        assert problem == "422: there is no [MASK] in '<b>nothing</b> to fill'; write it where a word is missing"
        assert (status, result) == ("", "")
        fill(shown, text="[MASK] again")
        assert answer(shown)[1] == ""

    def test_what_was_cut_is_said(self, page):
        shown = page("text-classification")
        fill(shown, text="word " * 1000)
        assert "512" in answer(shown)[1]
        shown.run("document.getElementById('field-truncation').click()")
        fill(shown)
        assert answer(shown)[1] == ""
        assert "1 text" in shown.run("document.getElementById('facts').innerText")

    @pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
    def test_the_command_does_what_the_page_did(self, page):
        shown = page("text-classification")
        fill(shown, text=MARKUP)
        best = answer(shown)[0].removeprefix("Best: ")
        line = shown.run("document.getElementById('curl').textContent")
        done = subprocess.run(["bash", "-c", f"{line} --silent"], capture_output=True, text=True, check=True)
        assert f'"label":"{best}"' in done.stdout
        shown.run("document.getElementById('copy').click()")
        assert shown.wait("document.getElementById('copied').textContent")

    def test_it_can_be_stopped(self, page):
        shown = page("fill-mask")
        shown.run(
            "window.fetch = (path, { signal }) => new Promise((_, refuse) =>"
            " signal.addEventListener('abort', () => refuse(signal.reason)))"
        )
        shown.run("document.querySelector('textarea').focus()")
        shown.press("Enter", control=True)
        shown.wait("document.getElementById('run').textContent === 'Stop'")
        shown.run("document.getElementById('run').click()")
        assert answer(shown)[1] == "Stopped."
        assert shown.run("document.getElementById('run').textContent") == "Run"

    def test_text_is_shown_as_it_comes_and_stays_when_it_is_stopped(self, page):
        shown = page("text-generation")
        shown.run(
            "window.fetch = (path, { body, signal }) => { window.sent = JSON.parse(body);"
            ' const event = \'data: {"choices": [{"index": 0, "text": " a girl"}]}\\n\\n\';'
            " const stream = new ReadableStream({ start(to) { to.enqueue(new TextEncoder().encode(event.slice(0, 20)));"
            " to.enqueue(new TextEncoder().encode(event.slice(20)));"
            " signal.addEventListener('abort', () => to.error(signal.reason)); } });"
            " return Promise.resolve(new Response(stream)); }"
        )
        fill(shown, text="Once there was")
        shown.wait("document.getElementById('result').innerText.includes('Once there was a girl')")
        assert shown.run("window.sent.stream") is True
        assert shown.run("document.getElementById('run').textContent") == "Stop"
        shown.run("document.getElementById('run').click()")
        _, problem, result = answer(shown)
        assert (problem, result) == ("Stopped.", "Once there was a girl")

    def test_the_keyboard_reaches_everything_and_the_focus_is_seen(self, page):
        shown = page("question-answering")
        shown.run("document.activeElement.blur()")
        seen = []
        for _ in range(10):
            shown.press("Tab")
            focus = "document.activeElement.id || document.activeElement.tagName"
            seen.append(shown.run(focus))
            assert shown.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            if seen[-1] == "run":
                shown.press("Enter")
                assert answer(shown)[1] == ""
        options = ["field-top_k", "field-max_answer_len", "field-handle_impossible_answer"]
        assert seen == ["A", "task", "model", "field-question", "field-context", *options, "run", "copy"]
        shown.run("document.getElementById('task').focus()")
        shown.press("ArrowDown")
        shown.wait("document.getElementById('task').value === 'multiple-choice'")
        assert shown.run("location.hash") == "#multiple-choice"
        unnamed = "[...document.querySelectorAll('input, select, textarea')].filter((one) => !one.labels.length).length"
        assert shown.run(unnamed) == 0

    def test_the_key_is_asked_for_and_stays_in_the_tab(self, browser, pipelines, tmp_path):
        (tmp_path / "keys").write_text("secret-key\n")
        url, end = start(create_app({"fill": pipelines["fill"]}, access_log=False, api_key_file=str(tmp_path / "keys")))
        try:
            browser.open(url)
            browser.wait("document.getElementById('problem').textContent.startsWith('401: the API key is missing')")
            assert browser.run("document.activeElement.id") == "key"
            browser.write("wrong")
            browser.press("Enter")
            browser.wait("!document.getElementById('unlock').hidden && !document.getElementById('key').value")
            browser.write("secret-key")
            browser.press("Enter")
            browser.wait("!document.getElementById('task').disabled")
            browser.run("document.querySelector('textarea').focus()")
            browser.press("Enter", control=True)
            assert answer(browser)[1] == ""
            assert browser.run("document.getElementById('unlock').hidden")
            line = browser.run("document.getElementById('curl').textContent")
            assert '"Authorization: Bearer $MODERNBERT_API_KEY"' in line
            assert "secret-key" not in browser.run("document.documentElement.outerHTML + localStorage.length")
            assert browser.run("sessionStorage.getItem('key')") == "secret-key"
        finally:
            browser.run("sessionStorage.clear()")
            end()

    def test_it_is_light_or_dark_as_the_screen_is(self, page):
        colours = [
            page("fill-mask", dark=dark).run("getComputedStyle(document.body).backgroundColor")
            for dark in (False, True)
        ]
        light, dark = (sum(map(int, re.findall(r"\d+", colour))) for colour in colours)
        assert light > 600
        assert dark < 150
