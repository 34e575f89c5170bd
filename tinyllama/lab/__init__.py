"""The attention lab: change attention in ten lines, and see what it did. docs/attention-lab.md shows how.

contract    contract.py, clauses.py, checks.py, trial.py: does a kernel keep the twelve clauses?
variants    variants.py, restatements.py: built-in kernels; kernel_file.py: a kernel by name, or from a file
scorecard   scorecard.py measures changes (change.py): perplexity.py, effects.py, speed.py, continuation.py;
            figures.py holds the results, tables.py and page.py show them
healing     healing.py trains the changed layers, healed.py keeps them in a file
questions   interpretation.py: logit lens, attribution, patching, head scores
"""

import lazy_loader

# The names are listed in __init__.pyi and imported on first use, so `--help` does not load PyTorch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
