"""Text and ids: chat templates, tokenizers, streamed text, and the grammars that answers are held to."""
