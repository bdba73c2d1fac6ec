"""Parts of models on this machine's disk."""
