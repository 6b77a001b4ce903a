"""The second front door: an HTTP API that OpenAI's clients speak, in the router's process and event loop.

door.py       sockets, the server, how long clients may take
middleware.py what every request passes first: its id, and whose page it may be
app.py        which path is what
body.py       a request's bytes to checked fields
prompts.py    fields to GenerateRequests (chat_template.py renders conversations)
exchange.py   requests through the orchestrator, for as long as the client stays
answers.py    events to OpenAI's objects, whole or as a stream
failures.py   errors to OpenAI's error objects
"""
