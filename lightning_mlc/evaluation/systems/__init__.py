"""What is evaluated: local models and endpoints, and how they generate."""
