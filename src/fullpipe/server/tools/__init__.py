"""What a model says is told apart here: words, thoughts, calls of tools.

A `events.Reader` takes an answer's text in pieces, as it becomes certain, and says what it is. However the text is cut,
the events join to the same, so streamed and whole answers are made by the same code. `names.py` knows the forms in
which models write calls, one module each; `json_calls.py` reads those parts of them that are JSON.
"""
