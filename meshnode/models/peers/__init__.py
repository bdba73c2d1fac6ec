"""Models from and for other members: the `store` service."""
