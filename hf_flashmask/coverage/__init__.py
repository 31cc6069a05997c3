"""Every model type of the installed Transformers, tiny and random: flashmask against eager. ``flashmask check``."""
