"""What a checkpoint takes, and how many frames fit.

It imports nothing, so that `crosslmm info 7B` can read the counts in preset_costs.json, which docs/tables.py writes,
without importing the package.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointCosts:
    """Counts of a checkpoint. Bytes are of tensors in `dtype`, without activations.

    parts: parameters by part; tied weights are counted once.
    weight_bytes: of all parts; gates are float32, quantised weights have their quantised size.
    tokens_per_frame: pooled tokens and the words of its time, and so positions of the context.
    max_positions: the context length, with rope scaling.
    cache_bytes_per_frame: T2V's cache during generation, by form ("kv", "features").
    language_bytes_per_frame: the language model's own cache of these tokens.
    prefill_bytes_per_frame: additional memory until the end of the prefill, by form: for "kv" the original tokens and,
        if the config normalises them, the normalised tokens.
    """

    dtype: str
    parts: dict[str, int]
    weight_bytes: int
    tokens_per_frame: int
    max_positions: int
    cache_bytes_per_frame: dict[str, int]
    language_bytes_per_frame: int
    prefill_bytes_per_frame: dict[str, int]

    def frames_in_memory(self, form: str, memory_bytes: float) -> int:
        """Most frames whose prefill fits into memory together with the weights."""
        per_frame = (
            self.cache_bytes_per_frame[form] + self.prefill_bytes_per_frame[form] + self.language_bytes_per_frame
        )
        return max(0, int((memory_bytes - self.weight_bytes) // per_frame))

    def frames_in_context(self, num_positions: int) -> int:
        """Most frames whose pooled tokens fit into a context together with `text_tokens`."""
        return (num_positions - self.text_tokens(num_positions)) // self.tokens_per_frame

    def text_tokens(self, num_positions: int) -> int:
        """Positions left for questions and answers: 512, or a quarter of a small context."""
        return min(512, num_positions // 4)


__all__ = ["CheckpointCosts"]
