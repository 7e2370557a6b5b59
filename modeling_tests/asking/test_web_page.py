"""The web page, through Gradio's own client over loopback."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

gradio = pytest.importorskip("gradio", reason='the page needs pip install "transformers_crosslmm[demo]"')
import httpx  # noqa: E402
from gradio import processing_utils  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402

from factories import mp4_of, random_frames, save_checkpoint  # noqa: E402
from transformers_crosslmm import video_worker  # noqa: E402
from transformers_crosslmm.asking import web_page  # noqa: E402
from transformers_crosslmm.asking.conversation import VideoConversation, read_video  # noqa: E402
from transformers_crosslmm.checkpoints.load import load_model, load_processor  # noqa: E402

LIMIT = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, two videos of different lengths, a text that is no video, and a file that is too large."""
    folder = tmp_path_factory.mktemp("demo")
    save_checkpoint(folder / "checkpoint")
    for name, seconds in (("five.mp4", 5), ("three.mp4", 3)):
        (folder / name).write_bytes(mp4_of(random_frames(seconds, seed=seconds).repeat(4, axis=0), fps=4))
    (folder / "notes.mp4").write_text("not a video")
    (folder / "large.mp4").write_bytes(bytes(LIMIT + 1))
    return folder


@pytest.fixture(scope="module")
def address(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web_page, "MAX_NEW_TOKENS", 7)
        patch.setattr(web_page, "MAX_UPLOAD_BYTES", LIMIT)
        page = web_page.build_page(folder / "checkpoint", device="cpu")
        yield web_page.serve_page(page, wait=False)
        page.close()


@pytest.fixture
def visitor(address):
    return lambda: Client(address, verbose=False, analytics_enabled=False)


@pytest.fixture(scope="module")
def said(folder):
    """What `VideoConversation` answers: `said("five.mp4", "…", "…")`."""
    model, processor = load_model(folder / "checkpoint", device="cpu"), load_processor(folder / "checkpoint")

    def said(name: str, *questions: str) -> list[str]:
        conversation = VideoConversation(model, processor, read_video(processor, str(folder / name)))
        return [conversation.ask(question, max_new_tokens=7).text for question in questions]

    return said


def answers_in(chat: list) -> list[str]:
    return ["".join(part["text"] for part in turn["content"]) for turn in chat if turn["role"] == "assistant"]


def test_it_listens_at_this_machine_only(address):
    assert address.startswith("http://127.0.0.1:")


def test_an_upload_is_asked_twice_and_encoded_once(visitor, folder, said, monkeypatch):
    encoded = []
    encode = web_page.PrefilledVideo.__init__
    monkeypatch.setattr(
        web_page.PrefilledVideo, "__init__", lambda *arguments: encoded.append(1) or encode(*arguments)
    )
    client = visitor()
    sheet, chat, timeline = client.predict(handle_file(str(folder / "five.mp4")), api_name="/look")
    assert Path(sheet).stat().st_size
    assert chat == []
    assert timeline is None
    first = client.submit("What happens?", api_name="/ask")
    first.result()
    streamed = [chat for chat, *_ in first.outputs()]
    assert [turn["role"] for turn in streamed[0]] == ["user", "assistant"]
    chat, timeline, question = client.predict("And then?", api_name="/ask")
    assert answers_in(chat) == said("five.mp4", "What happens?", "And then?")
    assert timeline is None or Path(timeline).stat().st_size
    assert question == ""
    assert len(encoded) == 1


def test_two_visitors_do_not_mix(visitor, folder, said):
    one, other = visitor(), visitor()
    one.predict(handle_file(str(folder / "five.mp4")), api_name="/look")
    other.predict(handle_file(str(folder / "three.mp4")), api_name="/look")
    jobs = [one.submit("What?", api_name="/ask"), other.submit("Where?", api_name="/ask")]
    for job in jobs:
        job.result()
    chats = [client.predict("And then?", api_name="/ask")[0] for client in (one, other)]
    assert answers_in(chats[0]) == said("five.mp4", "What?", "And then?")
    assert answers_in(chats[1]) == said("three.mp4", "Where?", "And then?")


def test_the_sample_can_be_asked(visitor):
    client = visitor()
    sheet, *_ = client.predict(api_name="/look_at_sample")
    assert Path(sheet).stat().st_size
    assert len(client.predict("What is there?", api_name="/ask")[0]) == 2


def test_a_bad_file_is_one_clear_error(visitor, folder):
    with pytest.raises(Exception, match=r"notes\.mp4: FFmpeg cannot open this") as error:
        visitor().predict(handle_file(str(folder / "notes.mp4")), api_name="/look")
    assert "Traceback" not in str(error.value)
    assert str(folder) not in str(error.value)


def test_an_upload_that_is_decoded_without_end_is_given_up_and_the_next_visitor_goes_on(visitor, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(video_worker, "_START", "import time; time.sleep(60)")
        patch.setattr(web_page, "LIMITS", replace(web_page.LIMITS, max_decode_seconds=0.5))
        with pytest.raises(Exception, match="took longer than"):
            visitor().predict(handle_file(str(folder / "three.mp4")), api_name="/look")
    assert visitor().predict(handle_file(str(folder / "three.mp4")), api_name="/look")
    assert web_page.LIMITS.max_decode_seconds <= 120


def test_a_file_that_is_too_large_is_refused(address, folder):
    with open(folder / "large.mp4", "rb") as file:
        response = httpx.post(f"{address}gradio_api/upload", files={"files": file})
    assert response.status_code == 413


def test_a_question_needs_words_and_a_video(visitor, folder):
    client = visitor()
    with pytest.raises(Exception, match="Upload a video"):
        client.predict("What?", api_name="/ask")
    client.predict(handle_file(str(folder / "three.mp4")), api_name="/look")
    with pytest.raises(Exception, match="needs words"):
        client.predict("  ", api_name="/ask")
    assert len(client.predict("What?", api_name="/ask")[0]) == 2


@pytest.mark.parametrize("kind", ["path", "file uri", "url"])
def test_what_was_not_uploaded_is_neither_opened_nor_fetched(address, folder, kind, monkeypatch):
    opened = []

    def note(*arguments, **_) -> None:
        opened.append(arguments)

    monkeypatch.setattr(web_page, "IsolatedStream", note)
    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", note)
    file = folder / "five.mp4"
    path = {"path": str(file), "file uri": file.as_uri(), "url": "http://192.0.2.1/five.mp4"}[kind]
    call = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
    event = httpx.post(f"{address}gradio_api/call/look", json=call).json()["event_id"]
    assert "event: error" in httpx.get(f"{address}gradio_api/call/look/{event}", timeout=30).text
    assert not opened


def test_a_bad_file_leaves_the_earlier_video(visitor, folder, said):
    client = visitor()
    client.predict(handle_file(str(folder / "three.mp4")), api_name="/look")
    with pytest.raises(Exception, match=r"notes\.mp4"):
        client.predict(handle_file(str(folder / "notes.mp4")), api_name="/look")
    assert answers_in(client.predict("What?", api_name="/ask")[0]) == said("three.mp4", "What?")


def test_a_dropped_visit_lets_its_thread_end():
    visit = web_page.Visit(SimpleNamespace(ask=None), [], [])
    visit.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        next(visit.ask("What?"))


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser is driven by selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def test_a_browser_uploads_asks_and_reads_the_answer(browser, address, folder, said):
    from selenium.webdriver.support.ui import WebDriverWait

    def found(selector: str, in_text: str = ""):
        """The first that is there and has the text."""
        return WebDriverWait(browser, 60).until(
            lambda _: [one for one in browser.find_elements("css selector", selector) if in_text in one.text]
        )[0]

    [answer] = said("five.mp4", "What happens?")
    browser.get(address)
    found("#upload input[type=file]").send_keys(str(folder / "five.mp4"))
    found("#sheet img")
    found("#question textarea").send_keys("What happens?\n")
    found("#chat", " ".join(answer.split()[:1]))
    found("#chat", "What happens?")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert [name for name in loaded if not name.startswith((address, "data:", "blob:"))] == []
