"""Load against a server that speaks OpenAI's protocol: who sends what when, and what it was like for the client."""
