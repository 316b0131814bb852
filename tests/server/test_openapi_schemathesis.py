"""schemathesis sends the served OpenAPI document's requests, right ones and wrong ones: no 5xx, and what comes back is
what the document says."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from one_word import OneWord, application
from schemathesis.specs.openapi.checks import positive_data_acceptance

from fullpipe.options import ServerOptions

# A body can fit the schema and still be refused, by what no schema says: a model that is not served, a token that the
# model does not have, a prompt longer than the context, stream_options without stream. JSON Schema also counts 1.0 as
# an integer, and FastAPI writes bounds as floats, so that of `seed` is one too high in the document.
NOT_CHECKED = [positive_data_acceptance]
KEY = "secret"


def document(**options: Any) -> Any:
    """The document of an application, as it serves it."""
    app = application(OneWord(), ServerOptions(**options), metrics=lambda: (b"up 1\n", "text/plain; charset=utf-8"))
    return schemathesis.openapi.from_asgi("/openapi.json", app, config=schemathesis.Config(seed=1))


def with_sense(case: schemathesis.Case) -> None:
    """Mends what no schema says, so that right bodies get past the checks of single fields; wrong values stay."""
    if not isinstance(case.body, dict):
        return
    body = case.body = dict(case.body)
    if isinstance(body.get("model"), str):
        body["model"] = "m"
    if body.get("prompt") == "":
        body["prompt"] = "hi"
    if body.get("top_logprobs") is not None and "messages" in body and not body.get("logprobs"):
        body["logprobs"] = True
    if body.get("stream_options") is not None and not body.get("stream"):
        body["stream"] = True
    if "best_of" in body and isinstance(body.get("n"), int | None):
        body["best_of"] = body.get("n")


open_to_all, closed = document(), document(api_key=[KEY])
# Beside the cases that schemathesis derives from the schema one by one, some 600 for each of the two kinds of request.
bounded = settings(max_examples=20, derandomize=True, database=None, deadline=None,
                   phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))


@open_to_all.parametrize()
@bounded
def test_an_open_server(case: schemathesis.Case) -> None:
    with_sense(case)
    case.call_and_validate(excluded_checks=NOT_CHECKED)


@closed.include(method="GET").parametrize()
@bounded
def test_a_server_with_a_key(case: schemathesis.Case) -> None:
    with_sense(case)
    case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, excluded_checks=NOT_CHECKED)


@pytest.mark.parametrize("schema", [open_to_all, closed])
def test_every_operation_is_covered(schema: Any) -> None:
    found = {operation.ok().label for operation in schema.get_all_operations()}
    assert found == {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses", "GET /v1/models",
                     "GET /v1/models/{name}", "GET /health", "GET /ready", "GET /version",
                     "GET /metrics", "POST /tokenize", "POST /detokenize"}
