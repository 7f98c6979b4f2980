"""Messages, tools and texts to prompts."""
