"""PaceLLM on Ray Serve: one deployment that is its own ingress, and a router that knows where sessions are."""
