"""From files of multilingual prompts to the batches of a step."""
