"""CrossLMM for Hugging Face Transformers. The import registers the model with the Auto classes and `pipeline`."""

from pathlib import Path

from ._torchvision import hide_broken_torchvision

hide_broken_torchvision()

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # noqa: E402
from transformers.models.auto.video_processing_auto import AutoVideoProcessor  # noqa: E402
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil  # noqa: E402
from transformers.pipelines import PIPELINE_REGISTRY  # noqa: E402

from ._version import __version__  # noqa: E402
from .configuration_crosslmm import CrossLMMConfig  # noqa: E402
from .dialect_crosslmm import warn_of_untested_release  # noqa: E402
from .media_crosslmm import encode_video, load_encoded_media, save_encoded_media  # noqa: E402
from .modeling_crosslmm import (  # noqa: E402
    CrossLMMForConditionalGeneration,
    CrossLMMModel,
    CrossLMMPreTrainedModel,
)
from .pipeline_crosslmm import VideoTextToTextPipeline  # noqa: E402
from .processing_crosslmm import CrossLMMProcessor  # noqa: E402
from .training.lora import crosslmm_lora_config  # noqa: E402
from .video_decoding import VideoDecodeWarning, VideoError, VideoLimits, decode_video  # noqa: E402
from .video_processing_crosslmm import CrossLMMVideoProcessor  # noqa: E402

TINY_CHECKPOINT = Path(__file__).parent / "tiny" / "crosslmm-tiny"
"""Folder of the small trained checkpoint in the package."""

warn_of_untested_release()

AutoConfig.register("crosslmm", CrossLMMConfig, exist_ok=True)
AutoModel.register(CrossLMMConfig, CrossLMMModel, exist_ok=True)
AutoModelForImageTextToText.register(CrossLMMConfig, CrossLMMForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(CrossLMMConfig, CrossLMMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(CrossLMMConfig, CrossLMMProcessor, exist_ok=True)
AutoVideoProcessor.register(CrossLMMConfig, CrossLMMVideoProcessor, exist_ok=True)
AutoImageProcessor.register(
    CrossLMMConfig,
    image_processor_classes={"pil": SiglipImageProcessorPil, "torchvision": SiglipImageProcessorPil},
    exist_ok=True,
)
if "video-text-to-text" not in PIPELINE_REGISTRY.supported_tasks:
    PIPELINE_REGISTRY.register_pipeline(
        "video-text-to-text",
        pipeline_class=VideoTextToTextPipeline,
        pt_model=AutoModelForImageTextToText,
        type="multimodal",
    )

__all__ = [
    "TINY_CHECKPOINT",
    "CrossLMMConfig",
    "CrossLMMForConditionalGeneration",
    "CrossLMMModel",
    "CrossLMMPreTrainedModel",
    "CrossLMMProcessor",
    "CrossLMMVideoProcessor",
    "VideoDecodeWarning",
    "VideoError",
    "VideoLimits",
    "VideoTextToTextPipeline",
    "__version__",
    "crosslmm_lora_config",
    "decode_video",
    "encode_video",
    "load_encoded_media",
    "save_encoded_media",
]
