"""What differs between the releases of Transformers that the package runs on (5.19 to 5.24).

Nothing else in the package compares a version, tries an import twice or inspects a signature. Every entry says which
releases need it and when it can go. Outside this file the package speaks the newest dialect.
"""


def declare_no_defaults(processor_kwargs: type) -> None:
    """Say that the keyword arguments of a processor have no defaults of their own.

    5.19 to 5.22 read `_defaults` of the class, which a subclass does not inherit; later releases do without. Can go
    with 5.22.
    """
    processor_kwargs._defaults = {}  # type: ignore[attr-defined]
