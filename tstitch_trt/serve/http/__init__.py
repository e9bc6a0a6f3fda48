"""The HTTP server: OpenAI's images API over a batching engine."""
