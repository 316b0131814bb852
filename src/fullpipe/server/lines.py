"""A stream of chats and completions is written here as it goes over the wire."""

from __future__ import annotations

from pydantic import BaseModel

from fullpipe.server.problems import Problem


class Lines:
    """Writes data alone, one line for each chunk, and `[DONE]` behind the last."""

    end = "data: [DONE]\n\n"

    def event(self, chunk: BaseModel) -> str:
        return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"

    def broken(self, problem: Problem) -> str:
        return f"data: {problem.event()}\n\n{self.end}"
