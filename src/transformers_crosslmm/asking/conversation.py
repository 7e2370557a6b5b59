"""A video and the questions asked about it, one after the other: it is decoded, encoded and prefilled once.

Encoding goes on while the video is decoded, a chunk of frames at a time, so that it may be long.

    model, processor = load_model(TINY_CHECKPOINT), load_processor(TINY_CHECKPOINT)
    conversation = VideoConversation(model, processor, read_video(processor, "clip.mp4", num_frames=8))
    conversation.ask("What happens?").text
    conversation.ask("And then?").text

Shapes: T frames.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache

from ..inputs_crosslmm import check_length
from ..media_crosslmm import CrossLMMEncodedMedia, encode_video
from ..modeling_crosslmm import CrossLMMForConditionalGeneration
from ..processing_crosslmm import CrossLMMProcessor
from ..video_processing_crosslmm import VideoStream
from .answer_text import AnswerText
from .pictures import frame_pictures


@dataclass(frozen=True)
class Answer:
    """text: the answer. tokens: the same in the pieces that were written, the end mark left out.

    frame_weights: (tokens, T), how much each frame weighed in T2V when a token was written: the mean over layers and
        heads, each row sums to 1; None unless asked for.
    """

    text: str
    tokens: list[str]
    frame_weights: torch.Tensor | None


def read_video(processor: CrossLMMProcessor, source: Any, **sampling: Any) -> VideoStream:
    """Begins to decode and sample a video as `CrossLMMVideoProcessor` does: its first frames are there.

    sampling: `num_frames`, `fps`, `max_frames`, `times`, `start_seconds`, `end_seconds`. Raises VideoError where the
    file cannot be decoded, ValueError for options that contradict each other.
    """
    [stream] = processor.video_processor.stream([source], **sampling)
    stream.begin()
    return stream


def end_token_ids(model: CrossLMMForConditionalGeneration, processor: CrossLMMProcessor) -> list[int]:
    """The tokens that end an answer: the generation config's, the tokenizer's, and the chat template's mark."""
    ends = model.generation_config.eos_token_id
    found = {processor.tokenizer.eos_token_id, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    found |= {ends} if isinstance(ends, int) else set(ends or ())
    return sorted(found - {None})


class VideoConversation:
    """Questions about one video, each answered with all before it in view.

    The video is encoded when the conversation begins and prefilled with the first question. From then on everything
    that was said stays in `cache`, and a question costs what its own tokens cost.

    messages: the chat so far. token_ids: what the cache has seen, and the token written last.
    """

    def __init__(
        self,
        model: CrossLMMForConditionalGeneration,
        processor: CrossLMMProcessor,
        video: VideoStream,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """on_progress: called with the frames encoded and all frames.

        Raises ValueError for more frames than the context holds, as far as can be told before they are encoded.
        """
        video.begin()
        check_length(video.expected_num_frames * processor.tokens_per_frame + 1, model.config, None)
        self.model, self.processor, self.video = model, processor, video
        self.messages: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.cache = DynamicCache()
        encoded = encode_video(model, video, on_progress=on_progress)
        self._media: dict[str, CrossLMMEncodedMedia] | None = {"video": encoded}
        self._ends = end_token_ids(model, processor)

    @torch.no_grad()
    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 256,
        on_text: Callable[[str], None] | None = None,
        with_frame_weights: bool = False,
    ) -> Answer:
        """Answers and remembers. A question that cannot be asked (too long for the context), or whose answer is
        interrupted, leaves no trace.

        on_text: called with each piece of the answer as soon as it is certain. The checkpoint's generation config
        decides how tokens are chosen.
        """
        if not question.strip():
            raise ValueError("A question needs words; got none.")
        parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if not self.messages:
            parts.insert(0, {"type": "video", "video": self.video.source})
        turn = {"role": "user", "content": parts}
        prompt = torch.tensor([self.token_ids + self._new_ids(turn)], device=self.model.device)
        length = int(self.cache.get_seq_length())
        try:
            written = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                mm_encoder_outputs=self._media,
                cache=self.cache,
                max_new_tokens=max_new_tokens,
                eos_token_id=self._ends,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                streamer=None if on_text is None else AnswerText(self.processor.tokenizer, on_text),
                return_dict_in_generate=True,
                output_cross_attentions=with_frame_weights,
            )
        except BaseException:  # Ctrl-C among them
            self._forget_behind(length)
            raise
        self._media = None  # the cache has them
        ids = written.sequences[0].tolist()
        if ids[-1] in self._ends:
            ids.pop()  # the cache has not seen it, and the template writes it where the next turn begins
        answered = ids[prompt.shape[1] :]
        decode = self.processor.tokenizer.decode
        text = decode(answered, skip_special_tokens=True).strip()
        self.token_ids = ids
        self.messages += [turn, {"role": "assistant", "content": text}]
        weights = None
        if with_frame_weights:
            weights = written.cross_attentions[0].mean(dim=(0, 1))[: len(answered)]
        return Answer(text, [decode([token_id]) for token_id in answered], weights)

    def _forget_behind(self, length: int) -> None:
        """Cuts the cache back, layer by layer: a call that was interrupted has filled some and not others."""
        if length == 0:
            self.cache = DynamicCache()
        for layer in self.cache.layers:
            layer.crop(min(0, length - int(layer.get_seq_length())))

    def pictures(self) -> list[Image.Image]:
        """The frames as the model sees them; the video is decoded again for them."""
        return [picture for chunk in self.video for picture in frame_pictures(chunk, self.processor.video_processor)]

    def _new_ids(self, turn: dict[str, Any]) -> list[int]:
        """The tokens from the end of the last answer to the beginning of the next."""

        def rendered(messages: list[dict[str, Any]]) -> str:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

        if not self.messages:
            text = rendered([turn])
            (text,), _ = self.processor._expand([text], [self.video.num_frames], [self.video.metadata])
        else:
            # The answer's own tokens are in the cache, and need not be those that its text would give.
            before = rendered(self.messages[:-1])
            text = rendered([*self.messages[:-1], {"role": "assistant", "content": ""}, turn])
            if not text.startswith(before):
                raise ValueError(
                    "The chat template must write earlier turns the same whatever follows, or a conversation cannot "
                    "go on in its cache; this one does not. Use CrossLMM's own."
                )
            text = text[len(before) :]
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


__all__ = ["Answer", "VideoConversation", "end_token_ids", "read_video"]
