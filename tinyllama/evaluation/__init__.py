"""What a change does on the benchmarks that papers report, by EleutherAI's lm-evaluation-harness.

harness     harness.py: the adapter, through which the harness asks a model; proven equal to the harness's own
tasks       tasks.py: tasks by name, from the harness or from toy/, the small ones that need no network
paired      paired.py: two runs on the same documents, their difference and how certain it is
"""
