"""`crosslmm demo`: a web page that answers questions about an uploaded video and shows the frames' attention weights.

Only this file uses Gradio. A visitor's video is decoded in a separate process under limits, encoded and prefilled
once, and kept in the visitor's session until it is replaced or expires.
"""

import os
import queue
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from .. import TINY_CHECKPOINT
from ..checkpoints.load import caution, load_model, load_processor
from ..tiny.procedural_videos import random_generator, random_video, write_mp4
from ..video_decoding import VideoLimits
from .conversation import Answer
from .pictures import draw_contact_sheet, draw_timeline, frame_labels
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


@dataclass
class Visit:
    """A visitor's video with its chat and its frames for the pictures.

    thread: runs all questions, one at a time, so that each one follows the earlier ones in the chat.
    """

    conversation: PrefilledVideo
    frames: list[Image.Image]
    labels: list[str]
    chat: list[dict[str, str]] = field(default_factory=list)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))

    def ask(self, question: str) -> Iterator[str | Answer]:
        """Yields the answer's pieces as they are generated, then the `Answer`. Raises as `VideoConversation.ask`."""
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        answer = self.thread.submit(
            self.conversation.ask,
            question,
            max_new_tokens=MAX_NEW_TOKENS,
            on_text=pieces.put,
            with_frame_weights=True,
        )
        answer.add_done_callback(lambda _: pieces.put(None))
        yield from iter(pieces.get, None)
        yield answer.result()

    def close(self) -> None:
        """Lets the thread end after the questions already asked; memory is freed with the last reference."""
        self.thread.shutdown(wait=False)


def build_page(model: str | os.PathLike = TINY_CHECKPOINT, *, device: str | None = None) -> Any:
    """Loads the model and builds the page as `gradio.Blocks`; `serve_page` starts its server.

    model: folder or name of a checkpoint. device: as for `load_model`.
    Raises ImportError without Gradio.
    """
    gradio = _import_gradio()
    processor = load_processor(model)
    network = load_model(model, device=device)
    folder = tempfile.TemporaryDirectory(prefix="crosslmm-demo-")
    sample = Path(folder.name) / "sample.mp4"
    write_mp4(random_video(random_generator(seed=0, split="heldout", index=0), split="heldout"), sample)

    def look(path: str, earlier: Visit | None) -> tuple[Visit, Image.Image, list, None]:
        name = os.path.basename(path)
        try:
            conversation = PrefilledVideo(network, processor, IsolatedStream(processor, path, limits=LIMITS))
            frames = conversation.pictures()
        except VIDEO_FAILURES as error:
            reason = f"{name}: {str(error).replace(path, name)}"
            raise gradio.Error(reason, title="No video", print_exception=False) from error  # the earlier one stays
        for frame in frames:
            frame.thumbnail((THUMBNAIL, THUMBNAIL))
        if earlier is not None:
            earlier.close()
        visit = Visit(conversation, frames, frame_labels(len(frames), conversation.video.times))
        return visit, draw_contact_sheet(frames, visit.labels), [], None

    def look_at_sample(earlier: Visit | None) -> tuple[Visit, Image.Image, list, None]:
        return look(str(sample), earlier)

    def ask(question: str, visit: Visit | None) -> Iterator[tuple[list[dict[str, str]], Any, str]]:
        if visit is None:
            raise gradio.Error("Upload a video or use the sample; then ask.", title="No video", print_exception=False)
        turn = {"role": "user", "content": question}
        text, answer = "", None
        try:
            for piece in visit.ask(question):
                if isinstance(piece, Answer):
                    answer = piece
                else:
                    text += piece
                    yield [*visit.chat, turn, {"role": "assistant", "content": text}], None, ""
        except VIDEO_FAILURES as error:
            raise gradio.Error(str(error), title="No answer", print_exception=False) from error
        assert answer is not None
        visit.chat += [turn, {"role": "assistant", "content": answer.text}]
        timeline = None
        if answer.tokens:
            timeline = draw_timeline(visit.frames, visit.labels, answer.tokens, answer.frame_weights)  # type: ignore[arg-type]
        yield list(visit.chat), timeline, ""

    with gradio.Blocks(title="CrossLMM", analytics_enabled=False, delete_cache=(IDLE_SECONDS, IDLE_SECONDS)) as page:
        page.sample_folder = folder  # kept as long as the page
        state = gradio.State(time_to_live=IDLE_SECONDS, delete_callback=lambda visit: visit and visit.close())
        gradio.Markdown(
            "# CrossLMM\nUpload a video once; then ask as often as you like. Frames count from 1. "
            f"At most {MAX_UPLOAD_BYTES // 2**20} MiB. Model: `{Path(model).name}`. "
            f"{caution(model, network.config) or ''}"
        )
        picture: dict[str, Any] = {
            "show_label": False,
            "format": "png",
            "interactive": False,
            "buttons": ["fullscreen", "download"],
        }
        with gradio.Row():
            with gradio.Column():
                # Not `gradio.Video`, which would open the upload with FFmpeg outside of our limits.
                upload = gradio.File(label="Video", file_types=["video"], elem_id="upload")
                upload.async_move_resource_to_block_cache = _refuse_urls(upload.async_move_resource_to_block_cache)
                take_sample = gradio.Button("Use the sample video", elem_id="sample")
                gradio.Markdown("The frames that the model sees")
                sheet = gradio.Image(elem_id="sheet", **picture)
            with gradio.Column():
                chat = gradio.Chatbot(label="Answers", render_markdown=False, buttons=["copy"], elem_id="chat")
                question = gradio.Textbox(
                    label="Question", max_length=MAX_QUESTION_CHARACTERS, submit_btn=True, elem_id="question"
                )
                gradio.Examples([[words] for words in EXAMPLE_QUESTIONS], [question], label="For example")
        gradio.Markdown("Attention: the weight of each frame for each token of the last answer")
        timeline = gradio.Image(elem_id="timeline", **picture)
        # One request at a time, from all visitors together, so that memory is not exceeded.
        queued: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
        seen = [state, sheet, chat, timeline]
        upload.upload(look, [upload, state], seen, api_name="look", **queued)
        take_sample.click(look_at_sample, [state], seen, api_name="look_at_sample", **queued)
        question.submit(ask, [question, state], [chat, timeline, question], api_name="ask", **queued)
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
