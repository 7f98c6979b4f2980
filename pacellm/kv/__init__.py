"""Where keys and values lie: refcounted blocks, and the prefix cache of prompts that were fed before."""
