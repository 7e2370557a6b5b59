"""Prevents a broken torchvision from breaking Transformers. The package does not need torchvision."""

import importlib.util
import sys
import warnings


def hide_broken_torchvision() -> None:
    """Hides an installed torchvision that cannot be imported (usually built for another torch), with one warning.

    Transformers checks only whether torchvision is installed, and then fails at its imports in processors, pipelines
    and most models.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, OSError, AttributeError, ImportError) as error:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        import_utils = sys.modules.get("transformers.utils.import_utils")
        for check in ("is_torchvision_available", "is_torchvision_v2_available", "is_torchvision_greater_or_equal"):
            cached = getattr(import_utils, check, None)
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()
        warnings.warn(
            f"The installed torchvision does not work with this torch ({error}) and is ignored. "
            "Uninstall it, or install the build that matches torch.",
            stacklevel=3,
        )
