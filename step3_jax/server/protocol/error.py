"""The form of every error."""

from __future__ import annotations

from step3_jax.server.protocol.common import Answer


class ErrorDetail(Answer):
    """What is wrong.

    Attributes:
      message: Field, value, what is allowed.
      type: The kind, such as invalid_request_error.
      param: The field.
      code: A word for programs.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """The body of every answer with a status of 400 or above, and the last event of a stream that failed."""

    error: ErrorDetail
