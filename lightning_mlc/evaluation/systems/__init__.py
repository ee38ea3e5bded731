"""The models that are evaluated, which are local models or endpoints, and how they generate."""
