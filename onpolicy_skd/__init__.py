"""On-policy selective distillation of language models on Ray."""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # `python -m onpolicy_skd.X` puts the working directory first on sys.path
    from onpolicy_skd import siblings

    siblings.bind()
