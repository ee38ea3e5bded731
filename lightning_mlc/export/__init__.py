"""From a checkpoint to a Hugging Face folder: weights, proof, model card, upload."""
