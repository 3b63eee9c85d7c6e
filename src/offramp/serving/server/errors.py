"""Everything that goes wrong, as OpenAI's error object."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from offramp.errors import BusyError, OfframpError, did_you_mean

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


class ApiError(Exception):
    """An answer that is an error object. param: the field it is about. code: for programs."""

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
        self.status, self.headers = status, dict(headers or {})
        self.body = error_object(status, message, param=param, code=code)


def error_object(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON body of an error."""
    kind = TYPES.get(status, "invalid_request_error")
    # Half of a surrogate pair, as JSON escapes may hold, has no UTF-8.
    message = message[:2000].encode("utf-8", "backslashreplace").decode("utf-8")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def api_error(error: BaseException) -> ApiError:
    """What a client is sent of an error: its own mistakes in full, ours by name alone."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(503, f"{error.problem} {error.remedy}", code="unavailable")
    if isinstance(error, OfframpError):
        return ApiError(400, f"{error.problem} {error.remedy}", code="invalid_value")
    log.error("A request failed.", exc_info=error)
    return ApiError(500, f"The server failed: {type(error).__name__}.", code="internal_error")


def validation_error(problems: Sequence[Mapping[str, Any]], known: Sequence[str] = ()) -> ApiError:
    """The first problem that pydantic found, in words. known: fields of the request."""
    problem = problems[0]
    where = ".".join(str(part) for part in problem["loc"] if part != "body")[:200]
    kind, said = problem["type"], str(problem["msg"])
    if kind == "extra_forbidden":
        field = str(problem["loc"][-1])
        top = len([part for part in problem["loc"] if part != "body"]) == 1
        remedy = did_you_mean(field, known) if top and known else "Leave it out."
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
    said = said.removeprefix("Value error, ")
    return ApiError(400, f"{where}: {said}", param=where, code="invalid_value")


def respond(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)


def add_handlers(app: FastAPI) -> None:
    """Let `app` answer with error objects, whatever is raised."""

    def ours(_: Request, error: Exception) -> JSONResponse:
        return respond(api_error(error))

    def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        body = getattr(request.scope.get("route"), "body_field", None)
        model = getattr(getattr(body, "field_info", None), "annotation", None)
        known = tuple(getattr(model, "model_fields", ()))
        return respond(validation_error(error.errors(), known))

    def plain(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        said = {
            404: f"There is no {request.url.path[:200]}.",
            405: f"{request.method} is not for it.",
        }
        message = said.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        return respond(ApiError(error.status_code, message, headers=headers))

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(OfframpError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, plain)
