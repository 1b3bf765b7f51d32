"""The service: OpenAI's API over HTTP."""
