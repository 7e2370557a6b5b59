"""What the server keeps of a visitor's live video; the page itself is in test_web_page.py."""

import base64
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from PIL import Image

from factories import random_frames, random_model, tiny_config, tiny_processor
from transformers_crosslmm.asking import waiting_frames
from transformers_crosslmm.asking.live_page import LiveVisit, LiveVisits

FRAMES = random_frames(6)


def picture(frame) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def loaded():
    processor = tiny_processor()
    ids = {"image_token_id": processor.image_token_id, "video_token_id": processor.video_token_id}
    config = tiny_config(text_config={"vocab_size": len(processor.tokenizer), "v2v_scope": "causal"}, **ids)
    return random_model(config), processor


@pytest.fixture
def thread():
    with ThreadPoolExecutor(max_workers=1) as thread:
        yield thread


def test_while_the_model_is_busy_the_newest_frames_are_kept_and_the_dropped_counted(loaded, thread, monkeypatch):
    monkeypatch.setattr(waiting_frames, "MAX_WAITING", 2)
    visit, go_on = LiveVisit(*loaded, thread, 1), threading.Event()
    thread.submit(go_on.wait, 60)
    for number, frame in enumerate(FRAMES[:5], 1):
        seen = visit.put(picture(frame), float(number), number)
    assert visit.state == "0 frames seen, 0 kept, 3 dropped, 5.0 s behind"
    go_on.set()
    seen.result(60)
    assert visit.live.times == [4.0, 5.0]
    visit.put(picture(FRAMES[5]), 9.0, 9).result(60)  # 6 to 8 were lost on their way
    assert visit.state == "3 frames seen, 3 kept, 6 dropped, 0.0 s behind"


def test_the_model_looks_no_more_at_what_was_replaced_or_has_ended(loaded, thread):
    visits, go_on, jobs, shown = LiveVisits(partial(LiveVisit, *loaded, thread), 2), threading.Event(), [], []
    thread.submit(go_on.wait, 60)
    for session, run in (("one", 1), ("one", 2), ("other", 1), ("third", 1)):  # the third replaces the first
        shown.append(visits.of_run(session, run))
        jobs.append(shown[-1].put(picture(FRAMES[0]), 1.0, 1))
    visits.end("third")
    go_on.set()
    for job in jobs:
        job.result(60)
    assert [visit.live.num_seen for visit in shown] == [0, 0, 1, 0]


def test_one_visitor_more_replaces_the_one_that_was_idle_longest(loaded, thread):
    visits = LiveVisits(partial(LiveVisit, *loaded, thread), 2)
    one, other = visits.of_run("one", 1), visits.of_run("other", 1)
    assert visits.of_run("one", 1) is one
    visits.of_run("third", 1)
    assert (visits.get("one"), visits.get("other")) == (one, None)
    visits.end("one")
    visits.end("one")
    assert visits.get("one") is None
    assert visits.get("third") is not None
    assert visits.of_run("other", 1) is not other
