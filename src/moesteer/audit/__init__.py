"""The audit: can a model's behaviour be removed at its routers, by how little, and what is lost beside it."""
