"""What runs the model that translates."""
