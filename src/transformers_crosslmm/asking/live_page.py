"""The live part of the web page, without Gradio: what the browser runs, and what the server keeps of a visitor.

The visitor's browser plays a camera or a file and sends one frame per second. So the browser decodes the video, not
the server, and the visitor can pause it, move in it, or change its speed.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import torch

from ..modeling_crosslmm import CrossLMMForConditionalGeneration
from ..processing_crosslmm import CrossLMMProcessor
from .live import LiveVideo, most_frames
from .waiting_frames import WaitingFrames
from .watch import counts

VIDEO_CSS = "video { width: 100%; max-height: 45vh; background: black; }"
PLAYER_HTML = """
<video controls muted playsinline></video>
<label class="button">Choose a video<input type="file" accept="video/*"></label>
<button class="button">Use the camera</button>
<span role="status"></span>
"""
PLAYER_CSS = """
.button {
  display: inline-block; margin: 8px 8px 0 0; padding: 8px 16px; font: inherit; cursor: pointer;
  border: none; border-radius: var(--button-large-radius);
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color);
}
.button:focus-visible, .button:focus-within { outline: 2px solid var(--color-accent); }
.button input { position: absolute; opacity: 0; width: 1px; }
"""
PLAYER_JS = """
const [video, file, button, status] = ["video", "input", "button", "span"].map((name) => element.querySelector(name));
const canvas = document.createElement("canvas");
let run = 0, number = 0, last = 0;

const play = (source, words) => {
  video.srcObject?.getTracks().forEach((track) => track.stop());
  URL.revokeObjectURL(video.src);
  video.removeAttribute("src");
  video.srcObject = source instanceof MediaStream ? source : null;
  if (source instanceof File) video.src = URL.createObjectURL(source);
  button.textContent = video.srcObject ? "Stop the camera" : "Use the camera";
  status.textContent = words;
  [run, number, last] = [run + 1, 0, 0];
  if (source) video.play().catch(() => {});  // the "error" event says why
};
file.onchange = () => { if (file.files[0]) play(file.files[0], file.files[0].name); };
button.onclick = async () => {
  if (video.srcObject) return play(null, "");
  try {
    play(await navigator.mediaDevices.getUserMedia({video: true}), "");
  } catch (error) {
    status.textContent = window.isSecureContext ? `No camera: ${error.message}` : "A camera needs a page over https.";
  }
};
video.onerror = () => { if (video.src) status.textContent = `This browser cannot play ${status.textContent}.`; };
setInterval(() => {
  const seconds = video.currentTime;
  if (video.paused || video.readyState < 2 || seconds === last) return;
  if (seconds < last) [run, number] = [run + 1, 0];
  last = seconds;
  const scale = Math.min(1, 768 / Math.max(video.videoWidth, video.videoHeight));
  canvas.width = Math.max(1, video.videoWidth * scale);
  canvas.height = Math.max(1, video.videoHeight * scale);
  canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
  trigger("frame", {run, number: ++number, seconds, image: canvas.toDataURL("image/jpeg", 0.9)});
}, 1000);
"""
"""A new source begins a new `run`, and so does moving back in a video. While a frame is being sent, later ones are
not; `number` counts them too, so that the server knows how many it missed."""


class LiveVisit:
    """One run of a visitor's source. The model encodes its frames in `thread`."""

    def __init__(
        self, model: CrossLMMForConditionalGeneration, processor: CrossLMMProcessor, thread: Executor, run: Any
    ) -> None:
        most = min(processor.video_processor.max_frames, most_frames(model, processor))
        self.live, self.waiting = LiveVideo(model, processor, most), WaitingFrames(processor)
        self.thread, self.run, self.num_shown = thread, run, 0

    def put(self, image: Any, seconds: Any, number: Any) -> Future:
        """Adds a frame from the browser, its `number`th of this run. The future is done when the model has seen it.

        Raises ValueError as `WaitingFrames.put_file`.
        """
        self.waiting.put_file(image, seconds)
        if isinstance(number, int):
            self.num_shown = number
        return self.thread.submit(self._look)

    def _look(self) -> None:
        frames, times = self.waiting.take()
        if frames:  # an earlier call may have taken all of them
            self.live.add(torch.stack(frames), times)

    @property
    def state(self) -> str:
        return counts(self.live, self.waiting, max(self.num_shown - self.waiting.num_received, 0))


class LiveVisits:
    """The live videos of all visitors, at most `most`. A further one replaces the one that was idle longest."""

    def __init__(self, begin: Callable[[Any], LiveVisit], most: int) -> None:
        """begin: creates the visit for a run."""
        self._begin, self._most, self._lock = begin, most, threading.Lock()
        self._visits: OrderedDict[str, LiveVisit] = OrderedDict()

    def get(self, session: str) -> LiveVisit | None:
        with self._lock:
            if session in self._visits:
                self._visits.move_to_end(session)
            return self._visits.get(session)

    def of_run(self, session: str, run: Any) -> LiveVisit:
        """The session's visit; a new one if the session has none or if its visit belongs to another run."""
        visit = self.get(session)
        if visit is None or visit.run != run:
            self.end(session)
            visit = self._begin(run)
            with self._lock:
                self._visits[session] = visit
                idle = next(iter(self._visits))
                is_full = len(self._visits) > self._most
            if is_full:
                self.end(idle)
        return visit

    def end(self, session: str) -> None:
        """Forgets the visit and drops its waiting frames."""
        with self._lock:
            visit = self._visits.pop(session, None)
        if visit is not None:
            visit.waiting.forget()


__all__ = ["LiveVisit", "LiveVisits"]
