"""OpenAI's protocol as pydantic models: requests that refuse what is not honoured, and the responses."""
