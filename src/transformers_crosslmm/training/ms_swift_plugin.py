"""Plugin for ms-swift 4: `swift sft --external_plugins …/ms_swift_plugin.py` fine-tunes a CrossLMM.

Registers the model with its parts, a template that encodes records as `crosslmm train` does, and the optimiser
`--optimizer=crosslmm`, which gives gates their own rate and no weight decay. Media are read below the folder
ROOT_IMAGE_DIR. `--model_kwargs` takes `num_frames` or `fps`, `max_frames`, `gate_learning_rate` and
`language_model_learning_rate`, with the meaning that they have for `crosslmm train`.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

# ms-swift puts this folder first on the path, where our `datasets.py` would hide the library of that name.
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
from swift.model import (  # noqa: E402
    ModelGroup,
    ModelLoader,
    ModelMeta,
    MultiModelKeys,
    register_model,
    register_model_arch,
)
from swift.optimizers import OptimizerCallback, optimizers_map  # noqa: E402
from swift.template import Template, TemplateMeta, register_template  # noqa: E402
from swift.utils import get_env_args  # noqa: E402
from transformers import AutoModelForImageTextToText, Trainer  # noqa: E402

from transformers_crosslmm import CrossLMMForConditionalGeneration  # noqa: E402
from transformers_crosslmm.checkpoints.load import load_processor  # noqa: E402
from transformers_crosslmm.media_crosslmm import join_frame_index  # noqa: E402
from transformers_crosslmm.training.samples import encode_chat  # noqa: E402
from transformers_crosslmm.training.trainer import (  # noqa: E402
    CrossLMMTrainingArguments,
    choose_frames,
    parameter_groups,
    refuse_random_branches,
)

NAME = "crosslmm"

NEUTRAL = {
    "truncation_strategy": "raise",
    "max_pixels": None,
    "use_chat_template": True,
    "padding_free": False,
    "loss_scale": "default",
    "sequence_parallel_size": 1,
    "response_prefix": None,
    "enable_thinking": None,
}
"""Options of ms-swift's templates that would change nothing here, with the only value that is accepted."""

NOT_LEARNED_FROM = ("tools", "objects", "audios", "chat_template_kwargs")
"""Columns of ms-swift's records that CrossLMM has no use for."""


class CrossLMMLoader(ModelLoader):
    """Loads model and processor with the installed package."""

    default_trust_remote_code = False

    def get_processor(self, model_dir: str, config: Any) -> Any:
        processor = load_processor(model_dir)
        kinds = {"num_frames": int, "fps": float, "max_frames": int}
        choose_frames(
            processor,
            cast(Any, SimpleNamespace(**{name: get_env_args(name, kind, None) for name, kind in kinds.items()})),
        )
        return processor

    def get_model(self, model_dir: str, config: Any, processor: Any, model_kwargs: dict[str, Any]) -> Any:
        self.auto_model_cls = AutoModelForImageTextToText
        model = super().get_model(model_dir, config, processor, model_kwargs)
        model.config.untrained = False
        return model


class CrossLMMTemplate(Template):
    """Encodes records as `encode_chat` does, with the processor's own chat template.

    Raises ValueError for options and columns that it would have to ignore.
    """

    placeholder_tokens: list[int] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name, value in NEUTRAL.items():
            if (given := kwargs.get(name, value)) != value:
                raise ValueError(f"With a CrossLMM `{name}` must be {value!r}; got {given!r}. Leave it out.")
        super().__init__(*args, **kwargs)

    def encode(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Encodes a record. ms-swift's own reading of messages would drop the options of media in them."""
        if isinstance(inputs, dict):
            inputs = inputs | {"messages": [], "record": inputs}
        return super().encode(inputs, *args, **kwargs)

    def _preprocess_inputs(self, inputs: Any) -> None:
        pass  # ms-swift would open images by any path or URL

    def _encode(self, inputs: Any) -> dict[str, Any]:
        if self.mode != "train" or self.task_type != "causal_lm":
            raise NotImplementedError(
                f"The plugin is for `swift sft`; got mode {self.mode!r} and task {self.task_type!r}. A trained "
                "checkpoint answers with `crosslmm ask` or Transformers' `generate`."
            )
        record = inputs.extra_kwargs["record"]
        if ignored := [name for name in NOT_LEARNED_FROM if record.get(name)]:
            raise ValueError(f"CrossLMM learns from `messages`, `images` and `videos` alone; take out {ignored[0]!r}.")
        if self.root_image_dir is None:
            raise ValueError("Set the environment variable ROOT_IMAGE_DIR to the folder of images and videos.")
        messages = list(record["messages"])
        if self.template_meta.default_system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.template_meta.default_system})
        chat = {"messages": messages, "images": record.get("images"), "videos": record.get("videos")}
        sample = encode_chat(self.processor, chat, media_root=self.root_image_dir)
        return sample | {name: sample[name].tolist() for name in ("input_ids", "labels")}

    def _data_collator_mm_data(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        media = super()._data_collator_mm_data(batch)
        counts = [sample["video_num_frames"] for sample in batch if "video_num_frames" in sample]
        own = {"video_num_frames": torch.cat(counts) if counts else None, "video_frame_index": join_frame_index(batch)}
        return media | {name: value for name, value in own.items() if value is not None}


class CrossLMMOptimizer(OptimizerCallback):
    """`--optim` on our parameter groups: `--learning_rate`, `--vit_lr`, and the rates in `--model_kwargs`."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        args, model = self.args, self.trainer.model if model is None else model
        if args.aligner_lr is not None:
            raise ValueError("`aligner_lr` does not exist here: the projector learns at `learning_rate`.")
        refuse_random_branches(model)
        groups = parameter_groups(
            model,
            learning_rate=args.learning_rate,
            vision_learning_rate=args.vit_lr,
            language_model_learning_rate=get_env_args("language_model_learning_rate", float, None),
            gate_learning_rate=get_env_args("gate_learning_rate", float, CrossLMMTrainingArguments.gate_learning_rate),
            weight_decay=args.weight_decay,
            decayed=self.trainer.get_decay_parameter_names(model),
        )
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return kind(groups, **options)


register_model_arch(
    MultiModelKeys(
        NAME,
        language_model=["model.language_model", "lm_head"],
        aligner="model.multi_modal_projector",
        vision_tower="model.vision_tower",
    ),
    exist_ok=True,
)
register_template(
    # The words around a turn are the chat template's.
    TemplateMeta(
        NAME, prefix=[], prompt=["{{QUERY}}"], chat_sep=[], system_prefix=["{{SYSTEM}}"], template_cls=CrossLMMTemplate
    ),
    exist_ok=True,
)
register_model(
    ModelMeta(
        NAME,
        [ModelGroup([])],
        CrossLMMLoader,
        template=NAME,
        model_arch=NAME,
        architectures=[CrossLMMForConditionalGeneration.__name__],
        is_multimodal=True,
        tags=["vision", "video"],
    ),
    exist_ok=True,
)
optimizers_map[NAME] = CrossLMMOptimizer
