"""An OpenAI-compatible server: a request in JSON becomes a `Question`, an engine answers it, the answer becomes JSON.

body -> openai_schema.ChatRequest -> chat_requests -> Question -> engine -> Piece, Piece ... -> JSON or SSE
"""
