"""The HTTP surface: OpenAI's API over the engine. No model code."""
