"""A model's name -> a folder -> weights: the Hub, the embedded model, files, loading."""

import warnings

with warnings.catch_warnings():  # in a notebook tqdm, which huggingface_hub imports, asks for ipywidgets
    warnings.filterwarnings("ignore", message="IProgress not found")
    import tqdm.auto  # type: ignore[import-untyped]  # noqa: F401
