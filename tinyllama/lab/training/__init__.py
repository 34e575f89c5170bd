"""Training: the steps that healing and training from scratch share, and the latter with its findings."""
