"""A causal language model as parts: which architectures, where their weights are, how a stage is cut out."""
