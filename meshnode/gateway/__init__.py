"""HTTP: the OpenAI routes of the served model, and what the node tells about itself."""
