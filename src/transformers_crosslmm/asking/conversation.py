"""Several questions about one video, which is decoded, encoded and prefilled once.

The video is encoded while it is decoded, a chunk of frames at a time, so it can be long.

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
from .pictures import stream_pictures


@dataclass(frozen=True)
class Answer:
    """text: the answer. tokens: the text of each generated token, without the end mark.

    frame_weights: (tokens, T), the T2V attention weight of each frame for each token, averaged over layers and heads;
        each row sums to 1. None unless requested.
    """

    text: str
    tokens: list[str]
    frame_weights: torch.Tensor | None


def read_video(processor: CrossLMMProcessor, source: Any, **sampling: Any) -> VideoStream:
    """Opens a video, sampled as by `CrossLMMVideoProcessor`, and decodes its first frames.

    sampling: `num_frames`, `fps`, `max_frames`, `times`, `start_seconds`, `end_seconds`. Raises VideoError if the file
    cannot be decoded, ValueError for contradicting options.
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
    """A chat about one video, or without one; each answer takes earlier questions and answers into account.

    The video is encoded when the conversation begins and prefilled with the first question. The chat stays in `cache`,
    so a later question costs only its own tokens. Without a video the language model answers alone.

    messages: the chat so far. token_ids: the tokens that the cache has seen, and the last generated one.
    """

    def __init__(
        self,
        model: CrossLMMForConditionalGeneration,
        processor: CrossLMMProcessor,
        video: VideoStream | None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Encodes the video. on_progress: called with the numbers of encoded frames and of all frames.

        Raises ValueError, before encoding, if the expected frames do not fit the context.
        """
        self._media: dict[str, CrossLMMEncodedMedia] | None = None
        if video is not None:
            video.begin()
            check_length(video.expected_num_frames * processor.tokens_per_frame + 1, model.config, None)
            self._media = {"video": encode_video(model, video, on_progress=on_progress)}
        self.model, self.processor, self.video = model, processor, video
        self.messages: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.cache = DynamicCache()
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
        """Answers a question and adds both to the chat. A question that is too long for the context, or whose answer
        is interrupted, leaves the chat unchanged.

        on_text: called with each piece of the answer when its text is final. The checkpoint's generation config
        decides how tokens are chosen.
        """
        if not question.strip():
            raise ValueError("A question needs words; got none.")
        parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if self.video is not None and not self.messages:
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
        except BaseException:  # Ctrl-C too
            self._forget_behind(length)
            raise
        self._media = None  # they are in the cache
        ids = written.sequences[0].tolist()
        if ids[-1] in self._ends:
            ids.pop()  # the cache has not seen it, and the template writes it at the next turn's beginning
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
        """Crops each layer of the cache to `length`; an interrupted call may have filled only some layers."""
        if length == 0:
            self.cache = DynamicCache()
        for layer in self.cache.layers:
            layer.crop(min(0, length - int(layer.get_seq_length())))

    def pictures(self) -> list[Image.Image]:
        """The frames as the model sees them; decodes the video again."""
        return [] if self.video is None else stream_pictures(self.video, self.processor.video_processor)

    def _new_ids(self, turn: dict[str, Any]) -> list[int]:
        """The tokens between the end of the last answer and the beginning of the next."""

        def rendered(messages: list[dict[str, Any]]) -> str:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

        if not self.messages:
            text = rendered([turn])
            if self.video is not None:
                (text,), _ = self.processor._expand([text], [self.video.num_frames], [self.video.metadata])
        else:
            # The cache has the answer's own tokens, which can differ from those of its tokenised text.
            before = rendered(self.messages[:-1])
            text = rendered([*self.messages[:-1], {"role": "assistant", "content": ""}, turn])
            if not text.startswith(before):
                raise ValueError(
                    "A conversation in a cache needs a chat template that writes earlier turns the same when more "
                    "follow; this one does not. Use CrossLMM's own."
                )
            text = text[len(before) :]
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


__all__ = ["Answer", "VideoConversation", "end_token_ids", "read_video"]
