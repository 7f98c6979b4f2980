"""Published long-context suites, asked of any OpenAI-compatible server. Nothing here imports torch."""
