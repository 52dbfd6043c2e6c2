"""The semantic reasoner: an LLM that reads a session, writes its latent query and embeds it."""
