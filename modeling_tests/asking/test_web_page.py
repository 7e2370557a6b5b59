"""The web page, through Gradio's own client over loopback."""

import base64
import io
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

gradio = pytest.importorskip("gradio", reason='the page needs pip install "transformers_crosslmm[demo]"')
import httpx  # noqa: E402
from gradio import processing_utils  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402
from PIL import Image  # noqa: E402

from factories import mp4_of, random_frames, save_checkpoint  # noqa: E402
from transformers_crosslmm import video_worker  # noqa: E402
from transformers_crosslmm.asking import web_page  # noqa: E402
from transformers_crosslmm.asking.conversation import VideoConversation, read_video  # noqa: E402
from transformers_crosslmm.asking.live import LiveVideo  # noqa: E402
from transformers_crosslmm.asking.live_page import LiveVisits  # noqa: E402
from transformers_crosslmm.checkpoints.load import load_model, load_processor  # noqa: E402

LIMIT = 2**20
FAKE_CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


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
def lives() -> list[LiveVisits]:
    """Those of the page."""
    return []


@pytest.fixture(scope="module")
def address(folder, lives):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web_page, "LiveVisits", lambda *given: lives.append(LiveVisits(*given)) or lives[-1])
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
    played, sheet, chat, timeline = client.predict(handle_file(str(folder / "five.mp4")), api_name="/look")
    assert httpx.get(f"{client.src}{played}").content == (folder / "five.mp4").read_bytes()
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
    played, sheet, *_ = client.predict(api_name="/look_at_sample")
    assert httpx.get(f"{client.src}{played}").content[4:8] == b"ftyp"
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


# --- live, without a browser -----------------------------------------------------------------------------------------

FRAMES = random_frames(6)


def picture(frame) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder / "checkpoint", device="cpu"), load_processor(folder / "checkpoint")


@pytest.fixture
def send(address):
    """`send("session", frame, seconds=…, run=…, number=…)` as the page does: the state, or None if it was refused."""
    config = httpx.get(f"{address}config").json()
    [see] = [one["id"] for one in config["dependencies"] if one["api_name"] == "see"]

    def send(session: str | None, frame, **shown) -> str | None:
        shown = {"run": 1, "number": 1} | shown | {"image": frame if isinstance(frame, str) else picture(frame)}
        body = {"fn_index": see, "data": [], "event_data": shown, "session_hash": session}
        answer = httpx.post(f"{address}gradio_api/run/predict", json=body, timeout=60)
        return answer.json()["data"][0] if answer.status_code == 200 else None

    return send


def test_a_live_video_is_asked_while_it_goes_on(send, visitor, loaded):
    client, live = visitor(), LiveVideo(*loaded, max_frames=8)
    for number in (1, 2, 3):
        send(client.session_hash, FRAMES[number], number=number, seconds=number + 0.5)
        live.add(FRAMES[number][None], [number + 0.5])
    chat, state, question = client.predict("What?", [], api_name="/ask_live")
    assert answers_in(chat) == [live.ask("What?", max_new_tokens=7).text]
    assert (state, question) == ("3 frames seen, 3 kept, 0 dropped, 0.0 s behind", "")
    send(client.session_hash, FRAMES[4], number=4, seconds=9)
    live.add(FRAMES[4][None], [9.0])
    chat, *_ = client.predict("And now?", chat, api_name="/ask_live")
    assert answers_in(chat)[1] == live.ask("And now?", max_new_tokens=7).text


def test_live_visitors_do_not_mix_and_a_new_run_begins_anew(send, visitor, loaded):
    one, other = visitor(), visitor()
    for number in (1, 2):
        send(one.session_hash, FRAMES[number], number=number, seconds=number)
        send(other.session_hash, FRAMES[-number], number=number, seconds=number)
    assert send(one.session_hash, FRAMES[0], run=2, seconds=0.5).startswith("1 frames seen, 1 kept")
    for client, frames, times in ((one, FRAMES[:1], [0.5]), (other, FRAMES[[-1, -2]], [1.0, 2.0])):
        live = LiveVideo(*loaded, max_frames=8)
        live.add(frames, times)
        [answer] = answers_in(client.predict("What?", [], api_name="/ask_live")[0])
        assert answer == live.ask("What?", max_new_tokens=7).text


@pytest.mark.parametrize(
    "bad",
    [
        {"seconds": 1.0},
        {"seconds": "2"},
        {"seconds": None},
        {"seconds": 1e300},
        {"frame": "/etc/passwd"},
        {"frame": "http://127.0.0.1/a.png"},
        {"session": None},
    ],
    ids=str,
)
def test_a_bad_frame_is_refused_and_the_next_one_seen(send, bad):
    session = f"bad {bad}"
    assert send(session, FRAMES[0], seconds=1.0)
    given = {"session": session, "frame": FRAMES[1], "seconds": 2.0} | bad
    assert send(given.pop("session"), given.pop("frame"), **given) is None
    assert " 0 dropped, 0.0 s behind" in send(session, FRAMES[1], seconds=3.0, number=2)


def test_a_live_question_needs_a_video(visitor):
    with pytest.raises(Exception, match="Use the camera or play a video"):
        visitor().predict("What?", [], api_name="/ask_live")


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser is driven by selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", *FAKE_CAMERA):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def found(browser, address):
    """`found(selector, text)`: the first element of the page that is there and has the text."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(address)

    def found(selector: str, in_text: str = ""):
        return WebDriverWait(browser, 60).until(
            lambda _: [one for one in browser.find_elements("css selector", selector) if in_text in one.text]
        )[0]

    return found


@pytest.fixture
def until():
    def until(condition, seconds: float = 60):
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, "it took too long"
            time.sleep(0.1)
        return value

    return until


def test_a_browser_uploads_asks_and_reads_the_answer(browser, found, address, folder, said):
    [answer] = said("five.mp4", "What happens?")
    found("#upload input[type=file]").send_keys(str(folder / "five.mp4"))
    found("#sheet img")
    found("#question textarea").send_keys("What happens?\n")
    found("#chat", " ".join(answer.split()[:1]))
    found("#chat", "What happens?")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert [name for name in loaded if not name.startswith((address, "data:", "blob:"))] == []


def test_a_click_on_a_frame_plays_from_its_second(browser, found, until, folder):
    def second() -> float:
        return browser.execute_script("return document.querySelector('#player video').currentTime")

    def click(selector: str, x: float, y: float) -> None:
        """At a share of a picture's width and height."""
        image = found(selector)
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", image)
        width, height = image.rect["width"], image.rect["height"]
        actions = ActionChains(browser)
        actions.move_to_element_with_offset(image, int((x - 0.5) * width), int((y - 0.5) * height)).click().perform()

    from selenium.webdriver import ActionChains

    found("#upload input[type=file]").send_keys(str(folder / "five.mp4"))
    found("#sheet img")
    assert until(lambda: browser.execute_script("return document.querySelector('#player video').readyState >= 2"))
    assert browser.execute_script("return document.querySelector('#player video').duration") == 5
    click("#sheet img", 0.6, 0.2)  # four columns, two rows: the third of frames 1 s apart
    until(lambda: second() == pytest.approx(2.0, abs=0.01))
    click("#sheet img", 0.1, 0.7)
    until(lambda: second() == pytest.approx(4.0, abs=0.01))
    click("#sheet img", 0.9, 0.7)  # no frame
    found("#question textarea").send_keys("What happens?\n")
    found("#timeline img")
    assert second() == pytest.approx(4.0, abs=0.01)
    click("#timeline img", 0.97, 0.1)
    until(lambda: second() == pytest.approx(4.0, abs=0.01))
    width = browser.execute_script("return document.querySelector('#timeline img').naturalWidth")
    click("#timeline img", 1 - 4.5 * 72 / width, 0.1)
    until(lambda: second() == pytest.approx(0.0, abs=0.01))


def test_a_camera_is_watched_and_asked_and_forgotten_with_its_page(browser, found, until, lives):
    def state() -> str:
        return found("#seen input, #seen textarea").get_attribute("value")

    [visits] = lives
    before = len(visits._visits)
    found("button[role=tab]", "Live").click()
    until(lambda: found("#live button", "Use the camera").is_displayed())
    found("#live button").click()
    until(lambda: state() and int(state().split()[0]) >= 3)
    found("#live_question textarea").send_keys("What happens?\n")
    found("#live_chat", "What happens?")
    until(lambda: "bot" in found("#live_chat").get_attribute("innerHTML"))
    seen = int(state().split()[0])
    until(lambda: int(state().split()[0]) > seen)
    found("#live button", "Stop the camera").click()
    found("#live button", "Use the camera")
    assert len(visits._visits) == before + 1
    browser.get("about:blank")
    until(lambda: len(visits._visits) == before)


def test_a_file_is_played_as_if_it_were_live(browser, found, until, folder, lives):
    def live() -> LiveVideo:
        return list(lives[0]._visits.values())[-1].live

    found("button[role=tab]", "Live").click()
    until(lambda: found("#live label").is_displayed())
    files = browser.find_element("css selector", "#live input[type=file]")
    files.send_keys(str(folder / "notes.mp4"))
    found("#live span", "This browser cannot play notes.mp4.")
    files.send_keys(str(folder / "five.mp4"))
    found("#live span", "five.mp4")
    until(lambda: browser.execute_script("return document.querySelector('#live video').ended"))
    until(lambda: live().num_seen >= 4)
    first, times = live(), live().times
    assert all(0 <= time <= 5 for time in times)
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert not [name for name in loaded if "upload" in name]
    again = "const video = document.querySelector('#live video'); video.currentTime = 0; video.play()"
    browser.execute_script(again)
    until(lambda: live() is not first and live().num_seen >= 1)
    assert live().times[0] < times[-1]
