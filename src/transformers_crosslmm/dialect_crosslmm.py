"""What differs between the releases of Transformers that the package runs on (5.19 to 5.24).

Nothing else in the package compares a version, tries an import twice or inspects a signature. Every entry says which
releases need it and when it can go. Outside this file the package speaks the newest dialect.
"""
