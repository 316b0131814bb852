"""OpenAI's Responses API, as far as a server that stores nothing can have it.

A request becomes a chat (`asking`), and the chat's chunks become items and events (`replies`, `output`): so responses
can do what chats can.
"""
