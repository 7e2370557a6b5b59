"""A worker of `answer_corpus` that asks vLLM: all questions about a video at once."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...asking.prefilled import VIDEO_FAILURES
from ...checkpoints.load import load_processor
from ..corpus import CorpusQuestion, VideoAnswerer, _described, _row
from .media import CrossLMMVideoLoader


class VllmVideoAnswerer(VideoAnswerer):
    """As `VideoAnswerer`, which runs the model itself. A video with frames that cannot be decoded is an error."""

    def __init__(
        self,
        model: str,
        attempts: str,
        *,
        device: str | None = None,
        max_new_tokens: int = 256,
        num_threads: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        from vllm import LLM, SamplingParams

        self.attempts, self.sampling = Path(attempts), dict(sampling or {})
        self.processor = load_processor(model)
        most = self.sampling.get("num_frames") or self.processor.video_processor.max_frames
        self.llm = LLM(model, limit_mm_per_prompt={"video": {"count": 1, "num_frames": most}, "image": 0})
        self.options = SamplingParams(temperature=0, max_tokens=max_new_tokens)

    def _answers(self, path: str, questions: list[CorpusQuestion]) -> Iterator[dict[str, str | None]]:
        try:
            video = CrossLMMVideoLoader.load_bytes(path, **self.sampling)
        except VIDEO_FAILURES as error:
            failure = _described(error)
            yield from (_row(question, error=failure) for question in questions)
            return
        asked = [self._request(question, video) for question in questions]
        try:
            outputs = self.llm.generate(asked, self.options, use_tqdm=False)
        except Exception as error:  # one that is too long refuses all; vLLM's errors have no class in common
            if len(questions) == 1:
                yield _row(questions[0], error=_described(error))
            else:
                for question in questions:
                    yield from self._answers(path, [question])
            return
        for question, output in zip(questions, outputs, strict=True):
            yield _row(question, answer=output.outputs[0].text)

    def _request(self, question: CorpusQuestion, video: Any) -> dict[str, Any]:
        content = [{"type": "video"}, {"type": "text", "text": question.question}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return {"prompt": prompt, "multi_modal_data": {"video": [video]}}
