"""Everything that goes wrong, as OpenAI's error object."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from offramp.core.errors import BusyError, OfframpError, did_you_mean

log = logging.getLogger(__name__)

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}
"""By status; all others are `invalid_request_error`."""


CALLS = ("tools", "tool_choice", "tool_calls", "functions", "function_call")
NO_CALLS = (
    "This server calls no tools: leave it out, or send an empty list. For answers as JSON there is "
    'response_format with {"type": "json_schema", ...}.'
)
ROUTES = (
    "There are POST /v1/chat/completions and /v1/completions, GET /v1/models, and "
    "/openapi.json, which tells of all."
)


class ApiError(Exception):
    """An error that is answered by an error object. param: name of the wrong field. code: for
    programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status: int = status
        self.headers: dict[str, str] = dict(headers or {})
        self.body: dict[str, Any] = error_object(status, message, param=param, code=code)


def error_object(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the JSON body of an error."""
    kind = TYPES.get(status, "invalid_request_error")
    # Half of a surrogate pair, as JSON escapes may hold, has no UTF-8.
    message = message[:2000].encode("utf-8", "backslashreplace").decode("utf-8")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def api_error(error: BaseException) -> ApiError:
    """Return an error as the client gets it: in full for a client's mistake, else by its name
    alone."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(503, f"{error.problem} {error.remedy}", code="unavailable")
    if isinstance(error, OfframpError):
        return ApiError(400, f"{error.problem} {error.remedy}", code="invalid_value")
    log.error("A request failed.", exc_info=error)
    return ApiError(500, f"The server failed: {type(error).__name__}.", code="internal_error")


def validation_error(
    problems: Sequence[Mapping[str, Any]], known: Sequence[str] = (), body: Any = None
) -> ApiError:
    """Return the first problem that pydantic found, in words. known: fields of the request. body:
    the client's body."""
    problem, field, said = _first_of(problems, body)
    where = _written(field)[:200]
    kind = problem["type"]
    if kind == "extra_forbidden":
        top = len(field) == 1
        remedy = did_you_mean(str(field[-1]), known) if top and known else "Leave it out."
        remedy = NO_CALLS if field[-1] in CALLS else remedy
        return ApiError(
            400,
            f"The field {where!r} is not supported. {remedy}",
            param=where,
            code="unknown_field",
        )
    if kind == "json_invalid":
        return ApiError(400, f"The body is not JSON: {said}.", code="invalid_json")
    if not where:
        said = f"The body must be a JSON object, sent as application/json: {said}"
        return ApiError(400, said, code="invalid_json")
    return ApiError(400, f"{where}: {said}", param=where, code="invalid_value")


Field = tuple[str | int, ...]
"""Of a body: keys and places on the way to it."""


def _first_of(
    problems: Sequence[Mapping[str, Any]], body: Any
) -> tuple[Mapping[str, Any], Field, str]:
    """The first problem, its field, and what it says. A value that may be of several kinds fails as
    each of them: the one that got furthest is what was meant, and all of them where none did."""
    fields = [_field(problem, body) for problem in problems]
    first, union = fields[0]
    if union is None:
        return problems[0], first, _said(problems[0])
    kinds = [
        (problem, field)
        for problem, (field, _) in zip(problems, fields, strict=True)
        if tuple(problem["loc"])[: len(union)] == union
    ]
    problem, field = max(kinds, key=lambda kind: len(kind[1]))  # the first of several
    if len(field) > len(first):
        return problem, field, _said(problem)
    said = dict.fromkeys(_said(other) for other, at in kinds if at == first)
    return problems[0], first, " or ".join(said).replace(" or Input should be ", " or ")


def _field(problem: Mapping[str, Any], body: Any) -> tuple[Field, tuple[Any, ...] | None]:
    """Where a problem is in the body, and pydantic's way to the first value that may be of several
    kinds; None: there is none on the way. That way also names kinds, which no body has."""
    way = tuple(problem["loc"])
    field: list[str | int] = []
    value, union, tagged = body, None, False
    for at, part in enumerate(way):
        if at == 0 and part == "body":
            continue
        here = isinstance(value, Mapping)
        if here and not tagged and value.get("type") == part and at + 1 < len(way):
            tagged = True  # the kind that the value says it is
        elif here and (part in value or str(part) in value):
            value, tagged = value.get(part, value.get(str(part))), False
            field.append(str(part))
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value, tagged = value[part], False
            field.append(part)
        elif at + 1 == len(way) and (problem["type"] == "missing" or body is None):
            field.append(part)
        elif union is None:
            union = way[:at]
    return tuple(field), union


def _said(problem: Mapping[str, Any]) -> str:
    return str(problem["msg"]).removeprefix("Value error, ")


def _written(field: Field) -> str:
    """A path as JavaScript writes it: messages[0].content[1].text."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in field)
    return text.removeprefix(".")


def respond(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)


def add_handlers(app: FastAPI) -> None:
    """Make `app` answer every exception with an error object."""

    def ours(_: Request, error: Exception) -> JSONResponse:
        return respond(api_error(error))

    def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        body = getattr(request.scope.get("route"), "body_field", None)
        model = getattr(getattr(body, "field_info", None), "annotation", None)
        known = tuple(getattr(model, "model_fields", ()))
        return respond(validation_error(error.errors(), known, error.body))

    def plain(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        said = {
            404: f"There is no {request.url.path[:200]}. {ROUTES}",
            405: f"{request.method} is not for it.",
        }
        message = said.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        return respond(ApiError(error.status_code, message, headers=headers))

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(OfframpError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, plain)
