"""These go over the wire: OpenAI's requests and answers as far as this server supports them.

The schema says exactly what is taken. A field of others' that would change the text is declared with the values that
ask for nothing (`null`, an empty list, a default), so that clients may send it; `REFUSED` says why no others are taken.
One that changes nothing in any text, and that no client means as a demand, is taken with any value: `IGNORED`. Values
are not coerced: "5" is no number. Unknown fields are refused, for an option that has no effect is worse than one that
fails.
"""
