"""From prompts in one language to prompts in several: what ``lightning-mlc translate`` does."""
