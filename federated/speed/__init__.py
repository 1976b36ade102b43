"""Speed, with equal results: caches of frozen work, several clients in one pass."""
