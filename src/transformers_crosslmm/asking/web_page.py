"""`crosslmm demo`: a web page that answers questions about an uploaded video and shows the frames' attention weights.

Only this file uses Gradio. A visitor's video is decoded in a separate process under limits, encoded and prefilled
once, and kept in the visitor's session until it is replaced or expires.
"""

import os
import queue
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from .. import TINY_CHECKPOINT
from ..checkpoints.load import caution, load_model, load_processor
from ..tiny.procedural_videos import random_generator, random_video, write_mp4
from ..video_decoding import VideoLimits
from .conversation import Answer, VideoConversation
from .live_page import PLAYER_CSS, PLAYER_HTML, PLAYER_JS, VIDEO_CSS, LiveVisit, LiveVisits
from .pictures import draw_contact_sheet, draw_timeline, frame_labels, frame_on_contact_sheet, frame_on_timeline
from .prefilled import VIDEO_FAILURES, IsolatedStream, PrefilledVideo

MAX_UPLOAD_BYTES = 64 * 2**20
LIMITS = VideoLimits(max_bytes=MAX_UPLOAD_BYTES, max_decode_seconds=120.0, max_memory_bytes=2 * 2**30)
"""Limits of one upload, during which all other visitors wait."""
MAX_SESSIONS = 16
"""The most sessions whose videos are in memory; a new one replaces the one that has been idle longest."""
IDLE_SECONDS = 1800
"""Time after which an unused video is dropped, and uploaded or drawn files are deleted."""
MAX_NEW_TOKENS = 256
MAX_QUESTION_CHARACTERS = 2000
THUMBNAIL = 160
"""Size in pixels of the frames kept for the pictures."""
EXAMPLE_QUESTIONS = (
    "What is in frame 3?",
    "In which frame does the red star appear?",
    "Is there a blue heart in the video?",
)

VIDEO_HTML = """<video controls muted playsinline src="${value}" ${value ? "" : "hidden"}></video>"""
PLAY_FROM = """(second) => {
  const video = document.querySelector("#player video");
  if (second !== null) video.currentTime = second + 0.001;  // rounding must not show the frame before
}"""


@dataclass
class Visit:
    """A visitor's video, its chat, and its frames for the pictures. tokens: those of the last answer."""

    conversation: PrefilledVideo
    frames: list[Image.Image]
    chat: list[dict[str, str]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    @property
    def times(self) -> list[float] | None:
        return self.conversation.video.times

    @property
    def labels(self) -> list[str]:
        return frame_labels(len(self.frames), self.times)


def answer_piecewise(
    thread: Executor, conversation: VideoConversation, question: str, **options: Any
) -> Iterator[tuple[str, Answer | None]]:
    """Yields the text written so far with None, and at the end the whole text with the `Answer`.

    Raises as `VideoConversation.ask`.
    """
    pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    answer = thread.submit(conversation.ask, question, max_new_tokens=MAX_NEW_TOKENS, on_text=pieces.put, **options)
    answer.add_done_callback(lambda _: pieces.put(None))
    text = ""
    for piece in iter(pieces.get, None):
        text += piece
        yield text, None
    yield answer.result().text, answer.result()


def build_page(
    model: str | os.PathLike = TINY_CHECKPOINT, *, device: str | None = None, add_timestamps: bool | None = None
) -> Any:
    """Loads the model and builds the page as `gradio.Blocks`; `serve_page` starts its server.

    model: folder or name of a checkpoint. device: as for `load_model`. add_timestamps: as for `load_processor`.
    Raises ImportError without Gradio.
    """
    gradio = _import_gradio()
    processor = load_processor(model, add_timestamps=add_timestamps)
    network = load_model(model, device=device)
    # The work for all visitors runs in one thread, so that the model needs memory for one at a time.
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
    lives = LiveVisits(partial(LiveVisit, network, processor, thread), MAX_SESSIONS)
    folder = tempfile.TemporaryDirectory(prefix="crosslmm-demo-")
    sample = Path(folder.name) / "sample.mp4"
    write_mp4(random_video(random_generator(seed=0, split="heldout", index=0), split="heldout"), sample)

    def look(path: str) -> tuple[Visit, str, Image.Image, list, None]:
        name = os.path.basename(path)

        def begun() -> Visit:
            conversation = PrefilledVideo(network, processor, IsolatedStream(processor, path, limits=LIMITS))
            return Visit(conversation, conversation.pictures())

        try:
            visit = thread.submit(begun).result()
        except VIDEO_FAILURES as error:
            reason = f"{name}: {str(error).replace(path, name)}"
            raise gradio.Error(reason, title="No video", print_exception=False) from error  # the earlier video stays
        for frame in visit.frames:
            frame.thumbnail((THUMBNAIL, THUMBNAIL))
        played = f"gradio_api/file={quote(path)}"
        return visit, played, draw_contact_sheet(visit.frames, visit.labels), [], None

    def look_at_sample() -> tuple[Visit, str, Image.Image, list, None]:
        return look(str(sample))

    def answered(
        conversation: VideoConversation, question: str, chat: list, **options: Any
    ) -> Iterator[tuple[list, Answer | None]]:
        turn = {"role": "user", "content": question}
        try:
            for text, answer in answer_piecewise(thread, conversation, question, **options):
                yield [*chat, turn, {"role": "assistant", "content": text}], answer
        except VIDEO_FAILURES as error:
            raise gradio.Error(str(error), title="No answer", print_exception=False) from error

    def ask(question: str, visit: Visit | None) -> Iterator[tuple[list, Any, str]]:
        if visit is None:
            raise gradio.Error(
                "Upload a video or use the sample video, then ask.", title="No video", print_exception=False
            )
        timeline = None
        for chat, answer in answered(visit.conversation, question, visit.chat, with_frame_weights=True):
            if answer is not None:
                visit.chat, visit.tokens = chat, answer.tokens
                if answer.tokens:
                    timeline = draw_timeline(visit.frames, visit.labels, answer.tokens, answer.frame_weights)  # type: ignore[arg-type]
            yield chat, timeline, ""

    def second_on_sheet(visit: Visit | None, at: gradio.SelectData) -> float | None:  # type: ignore[name-defined]
        frame = frame_on_contact_sheet(at.index[0], at.index[1], len(visit.frames)) if visit else None
        return visit.times[frame] if frame is not None and visit.times else None

    def second_on_timeline(visit: Visit | None, at: gradio.SelectData) -> float | None:  # type: ignore[name-defined]
        frame = frame_on_timeline(at.index[0], len(visit.frames), visit.tokens) if visit and visit.tokens else None
        return visit.times[frame] if frame is not None and visit.times else None

    def see(frame: gradio.EventData, request: gradio.Request) -> str:  # type: ignore[name-defined]
        shown = frame._data or {}
        try:
            if not request.session_hash:
                raise ValueError("A live video belongs to a session. Send `session_hash` with the request.")
            visit = lives.of_run(request.session_hash, shown.get("run"))
            seen = visit.put(shown.get("image"), shown.get("seconds"), shown.get("number"))
            with suppress(TimeoutError):  # the model is busy; the frame waits
                seen.result(timeout=0.5)
        except VIDEO_FAILURES as error:
            raise gradio.Error(str(error), title="No frame", print_exception=False) from error
        return visit.state

    def ask_live(question: str, chat: list, request: gradio.Request) -> Iterator[tuple[list, str, str]]:  # type: ignore[name-defined]
        visit = lives.get(request.session_hash or "")
        if visit is None:
            reason = "Use the camera or play a video, then ask."
            raise gradio.Error(reason, title="No video", print_exception=False)
        for said, _ in answered(visit.live, question, chat):
            yield said, visit.state, ""

    def leave(request: gradio.Request) -> None:  # type: ignore[name-defined]
        lives.end(request.session_hash or "")

    with gradio.Blocks(title="CrossLMM", analytics_enabled=False, delete_cache=(IDLE_SECONDS, IDLE_SECONDS)) as page:
        page.sample_folder = folder  # kept as long as the page
        gradio.Markdown(
            f"# CrossLMM\nFrames count from 1. Model: `{Path(model).name}`. {caution(model, network.config) or ''}"
        )
        picture: dict[str, Any] = {
            "show_label": False,
            "format": "png",
            "interactive": False,
            "buttons": ["fullscreen", "download"],
        }
        chatbot: dict[str, Any] = {"label": "Answers", "render_markdown": False, "buttons": ["copy"]}
        textbox: dict[str, Any] = {
            "label": "Question",
            "max_length": MAX_QUESTION_CHARACTERS,
            "submit_btn": True,
        }
        queued: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
        with gradio.Tab("A video"):
            state = gradio.State(time_to_live=IDLE_SECONDS)
            gradio.Markdown(
                f"Upload a video once, of at most {MAX_UPLOAD_BYTES // 2**20} MiB; then ask as often as you like."
            )
            with gradio.Row():
                with gradio.Column():
                    # Not `gradio.Video`, which would open the upload with FFmpeg outside of our limits.
                    upload = gradio.File(label="Video", file_types=["video"], elem_id="upload")
                    upload.async_move_resource_to_block_cache = _refuse_urls(upload.async_move_resource_to_block_cache)
                    take_sample = gradio.Button("Use the sample video", elem_id="sample")
                    player = gradio.HTML("", html_template=VIDEO_HTML, css_template=VIDEO_CSS, elem_id="player")
                    gradio.Markdown("The frames that the model sees; click on one to play from there")
                    sheet = gradio.Image(elem_id="sheet", **picture)
                with gradio.Column():
                    chat = gradio.Chatbot(elem_id="chat", **chatbot)
                    question = gradio.Textbox(elem_id="question", **textbox)
                    gradio.Examples([[words] for words in EXAMPLE_QUESTIONS], [question], label="For example")
            gradio.Markdown("Attention: the weight of each frame for each token of the last answer")
            timeline = gradio.Image(elem_id="timeline", **picture)
            second = gradio.Number(visible=False)
        with gradio.Tab("Live"):
            gradio.Markdown(
                "Ask questions while a video plays: from your camera, or a file that your browser plays. Your browser "
                "sends one frame per second and nothing else. An answer covers what was shown until you asked."
            )
            with gradio.Row():
                with gradio.Column():
                    live = gradio.HTML(
                        "",
                        html_template=PLAYER_HTML,
                        css_template=VIDEO_CSS + PLAYER_CSS,
                        js_on_load=PLAYER_JS,
                        apply_default_css=False,
                        elem_id="live",
                    )
                    seen = gradio.Textbox(container=False, interactive=False, elem_id="seen")
                with gradio.Column():
                    live_chat = gradio.Chatbot(elem_id="live_chat", **chatbot)
                    live_question = gradio.Textbox(elem_id="live_question", **textbox)
        looked = [state, player, sheet, chat, timeline]
        upload.upload(look, [upload], looked, api_name="look", **queued)
        take_sample.click(look_at_sample, None, looked, api_name="look_at_sample", **queued)
        question.submit(ask, [question, state], [chat, timeline, question], api_name="ask", **queued)
        for image, second_on in ((sheet, second_on_sheet), (timeline, second_on_timeline)):
            image.select(second_on, [state], second, api_visibility="private").then(None, second, None, js=PLAY_FROM)
        live.frame(see, None, seen, api_name="see", queue=False, show_progress="hidden", trigger_mode="once")
        live_question.submit(
            ask_live, [live_question, live_chat], [live_chat, seen, live_question], api_name="ask_live", **queued
        )
        page.unload(leave)
    return page


def serve_page(page: Any, *, host: str = "127.0.0.1", port: int | None = None, wait: bool = True) -> str:
    """Starts the server and returns its address (if `wait`, after it stops). Default port: a free one from 7860 on."""
    gradio = _import_gradio()
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not wait,
        share=False,
        max_file_size=MAX_UPLOAD_BYTES,
        allowed_paths=[page.sample_folder.name],
        state_session_capacity=MAX_SESSIONS,
        ssr_mode=False,
        footer_links=[],
        quiet=not wait,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none from elsewhere
    )
    return address


def _refuse_urls(move: Callable[[str], Awaitable[str]]) -> Callable[[str], Awaitable[str]]:
    """Wraps Gradio's handler of uploads to refuse URLs, which Gradio would fetch at any size."""

    async def moved(path: str) -> str:
        if "://" in path:
            raise ValueError("A video must be uploaded; URLs are not downloaded.")
        return await move(path)

    return moved


def _import_gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            'The page needs Gradio, and Gradio needs an older Pillow: `pip install -e ".[demo]"` in your clone, in a '
            "separate environment (docs/getting-started.md, Extras)."
        ) from error
    return gradio


__all__ = ["build_page", "serve_page"]
