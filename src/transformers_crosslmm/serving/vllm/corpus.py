"""A worker of `answer_corpus` that answers with vLLM, all questions about a video at once."""

from collections.abc import Iterator
from typing import Any

from ...asking.allowed_files import open_below
from ...asking.prefilled import VIDEO_FAILURES
from ..corpus import CorpusQuestion, Row, VideoAnswerer, _described, _row
from .media import CrossLMMVideoLoader


class VllmVideoAnswerer(VideoAnswerer):
    """`VideoAnswerer` with vLLM instead of the model. A video with frames that cannot be decoded is an error."""

    def _load(self, model: str, device: str | None) -> None:
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform

        sampling = self.processor.video_processor._sampling(**self.sampling)
        most = sampling.num_frames or sampling.max_frames or len(sampling.times or ())
        self.llm = LLM(
            model,
            dtype="float32" if current_platform.is_cpu() else "auto",  # like `load_model`
            limit_mm_per_prompt={"video": {"count": 1, "num_frames": most}, "image": 0},
        )
        self.options = SamplingParams(temperature=0, max_tokens=self.max_new_tokens, detokenize=False)

    def _answers(self, path: str, questions: list[CorpusQuestion]) -> Iterator[Row]:
        try:
            with open_below(path, [self.root]) as file:
                video = CrossLMMVideoLoader.load_bytes(file, **self.sampling)
        except VIDEO_FAILURES as error:
            failure = _described(error)
            yield from (_row(question, error=failure) for question in questions)
            return
        # vLLM refuses all questions for one that is too long, and then believes that its engine has the video.
        longest, fitting = self.llm.model_config.max_model_len - 1, []
        for question in questions:
            request = self._request(question, video)
            if (tokens := self._num_tokens(request)) > longest:
                yield _row(question, error=f"ValueError: It has {tokens} tokens with the video; {longest} fit.")
            else:
                fitting.append((question, request))
        if not fitting:
            return
        outputs = self.llm.generate([request for _, request in fitting], self.options, use_tqdm=False)
        for (question, _), output in zip(fitting, outputs, strict=True):
            # vLLM's own text drops an incomplete last character.
            text = self.processor.decode(output.outputs[0].token_ids, skip_special_tokens=True)
            yield _row(question, answer=text.strip())

    def _num_tokens(self, request: dict[str, Any]) -> int:
        [(frames, _)] = request["multi_modal_data"]["video"]
        text = self.processor.tokenizer(request["prompt"])["input_ids"]
        return len(text) - 1 + len(frames) * self.processor.tokens_per_frame

    def _request(self, question: CorpusQuestion, video: Any) -> dict[str, Any]:
        content = [{"type": "video"}, {"type": "text", "text": question.question}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return {"prompt": prompt, "multi_modal_data": {"video": [video]}}
