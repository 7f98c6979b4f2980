"""The endpoints, one HTTP noun a package or module: route, body (schema) and what is sent (wire) side by side."""
