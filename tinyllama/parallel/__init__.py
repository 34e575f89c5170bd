"""One model on several processes: which part each has, what they send each other, and how they end together.

`plan` says which rows of which weight a rank has, `ranks` lets the ranks talk, and `layers` gives a model the
few parts that talk. See docs/parallel.md.
"""
