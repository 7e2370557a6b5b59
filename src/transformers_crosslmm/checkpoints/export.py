"""`python -m transformers_crosslmm.export FOLDER OUT`: copies a checkpoint together with its code.

OUT loads with `trust_remote_code=True` without this package, and without it where the package is installed.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from ..configuration_crosslmm import CrossLMMConfig
from .folder import checkpoint_files

PROCESSOR = "processing_crosslmm.CrossLMMProcessor"
VIDEO_PROCESSOR = "video_processing_crosslmm.CrossLMMVideoProcessor"
PIPELINE = "pipeline_crosslmm.VideoTextToTextPipeline"


def export_with_code(folder: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Copies the `checkpoint_files` of a saved CrossLMM `folder`, and the modules that define it, to `out`.

    The configs in `out` name these modules. Returns `out`. Raises FileNotFoundError if `folder` has no config,
    ValueError if it is another model's or has a link out of itself, and FileExistsError if `out` is not empty.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"`{folder}` must be a folder written by `save_pretrained`; it has no config.json.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != CrossLMMConfig.model_type:
        raise ValueError(
            f"`{folder}` must have a {CrossLMMConfig.model_type!r} model; its config.json says "
            f"{config.get('model_type')!r}."
        )
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"`{out}` must be new or empty. Remove it first, or name another folder.")

    files = checkpoint_files(folder)
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, out / file.name)
    for module in code_files():
        shutil.copyfile(module, out / module.name)

    pipeline = {"impl": PIPELINE, "pt": ["AutoModelForImageTextToText"], "type": "multimodal"}
    config |= {"auto_map": CrossLMMConfig.auto_map, "custom_pipelines": {"video-text-to-text": pipeline}}
    write_json(out / "config.json", config)
    if (out / "processor_config.json").is_file():
        processor = json.loads((out / "processor_config.json").read_text(encoding="utf-8"))
        video_processor = processor.get("video_processor", {})
        video_processor["auto_map"] = {"AutoVideoProcessor": VIDEO_PROCESSOR}
        processor |= {"auto_map": {"AutoProcessor": PROCESSOR}, "video_processor": video_processor}
        write_json(out / "processor_config.json", processor)
    return out


def code_files() -> list[Path]:
    """The modules that the configs name, and all modules of this package that they import."""
    package = Path(__file__).parents[1]
    named = [*CrossLMMConfig.auto_map.values(), PROCESSOR, VIDEO_PROCESSOR, PIPELINE]
    modules = {package / f"{name.partition('.')[0]}.py" for name in named}
    needed = {Path(file) for module in modules for file in get_relative_import_files(module)}
    return sorted(modules | needed)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m transformers_crosslmm.export",
        description="Copy a CrossLMM checkpoint together with its code, to be loaded with trust_remote_code=True.",
    )
    parser.add_argument("folder", help="a checkpoint written by save_pretrained")
    parser.add_argument("out", help="a new folder")
    given = parser.parse_args(arguments)
    if Path(given.folder).is_dir():
        print(f"{given.out} gets:", *(f"  {file.name}" for file in checkpoint_files(Path(given.folder))), sep="\n")
    out = export_with_code(given.folder, given.out)
    print(f"{out}: load it with trust_remote_code=True where transformers_crosslmm is not installed.")


if __name__ == "__main__":
    main()
