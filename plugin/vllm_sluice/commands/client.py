"""The client of Sluice's HTTP API: one request, one checked answer, and every failure with its remedy."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from vllm_sluice.commands.answers import Answer, one_line
from vllm_sluice.commands.problem import Problem

TOKEN_VARIABLE = "SLUICE_ADMIN_TOKEN"
PREFIX = "/plugins/sluice/"

_NAMED = re.compile(r"\s*([A-Za-z0-9_.-]{1,64})\s*:\s*(\S+)\s*")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_CONFLICTS = (409, 412)
_SHOWN = 200

AnswerT = TypeVar("AnswerT", bound=Answer)


class Unreachable(Problem):
    """Nobody answered."""


class Refused(Problem):
    """The server answered with an error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Conflict(Refused):
    """The state is not what the change was made for, or somebody else keeps the engine paused."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Takes a redirection for an error, so that the token goes to no other address."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Client:
    """Speaks to one server.

    Parameters
    ----------
    url
        Base address without a slash at its end, such as `http://127.0.0.1:8000`.
    token
        Admin token, or None to send none.
    timeout
        Seconds to wait for an answer.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 10.0) -> None:
        self.url = url
        self._token = token
        self._timeout = timeout
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if urllib.parse.urlsplit(url).hostname in _LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy has another loopback interface
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, path: str, **query: object) -> Any:
        """Return the JSON data of an address under `/plugins/sluice/`.

        Raises
        ------
        Unreachable
            If nobody answers.
        Refused
            If the server answers with an error; a `Conflict` for the status 409 and 412.
        Problem
            If the answer is no JSON.
        """
        return self._ask("GET", f"{path}?{urllib.parse.urlencode(query)}" if query else path)

    def metrics(self) -> str:
        """Return the server's `/metrics`, in Prometheus's text format; see `get`."""
        return self._send("GET", "/metrics", "text/plain").decode("utf-8", "replace")

    def read(self, model: type[AnswerT], path: str, **query: object) -> AnswerT:
        """Return an answer as a model; see `get`."""
        return self.checked(model, self.get(path, **query))

    def put(
        self, model: type[AnswerT], path: str, body: Mapping[str, Any], if_generation: int | None = None
    ) -> AnswerT:
        """Ask for a change, only if the generation is `if_generation`; see `get`."""
        headers = {} if if_generation is None else {"If-Match": f'"{if_generation}"'}
        return self.checked(model, self._ask("PUT", path, body, headers))

    def post(self, model: type[AnswerT], path: str, body: Mapping[str, Any]) -> AnswerT:
        """Ask a question that takes a body; see `get`."""
        return self.checked(model, self._ask("POST", path, body))

    def checked(self, model: type[AnswerT], data: Any) -> AnswerT:
        """Return JSON data as a model.

        Raises
        ------
        Problem
            If the data are not of its form.
        """
        try:
            return model.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the answer"
            raise Problem(
                f"{self.url} answers in a form that this version cannot read ({where}: {first['msg']}); "
                "use the `sluice` of the server's own version, which `sluice doctor` shows there"
            ) from None

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> Any:
        content = self._send(method, PREFIX + path, "application/json", body, headers)
        try:
            return json.loads(content)
        except ValueError:
            raise Problem(
                f"{self.url}{PREFIX}{path} answers with something that is no JSON, {_beginning(content)}; "
                "is --url the address of a vLLM server with Sluice?"
            ) from None

    def _send(
        self, method: str, path: str, accept: str, body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        request = urllib.request.Request(f"{self.url}{path}", method=method, headers=dict(headers or {}))
        request.add_header("Accept", accept)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if self._token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            with error:
                self._refused(method, path, error)
        except TimeoutError:
            self._late(method)
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                self._late(method)
            raise Unreachable(self._unreachable(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(self._unreachable(error)) from None

    def _refused(self, method: str, path: str, error: urllib.error.HTTPError) -> NoReturn:
        try:
            content = error.read()
        except (OSError, http.client.HTTPException):
            content = b""
        status = error.code
        said, is_ours = _said(content)
        asked = f"{method} {path.partition('?')[0]}"
        if 300 <= status < 400:
            where = one_line(error.headers.get("Location") or "an address that it does not name")
            message = f"{self.url} redirects {asked} to {where}; redirections are not followed, name that with --url"
        elif is_ours:
            message = f"{self.url} refuses ({status}): {said}"
            if status == 401 and self._token is None:
                message += f" (no token was sent; name one with --token-file or {TOKEN_VARIABLE})"
        elif status in (404, 405):
            message = (
                f"{self.url} does not know {asked} ({status}: {said}); either Sluice is not loaded there "
                "(start it with `sluice serve`) or its setting control.enabled is false"
            )
        else:
            message = f"{self.url} answers {asked} with {status}: {said}; see the server's log"
        raise (Conflict if status in _CONFLICTS else Refused)(message, status)

    def _late(self, method: str) -> NoReturn:
        shown = f"no answer from {self.url} within {self._timeout:g} s"
        if method == "PUT":
            raise Unreachable(f"{shown}; the change may still be made, `sluice changes` says how it ended")
        raise Unreachable(f"{shown}; is the server overloaded, and is --url its address?")

    def _unreachable(self, reason: object) -> str:
        said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        return f"no answer from {self.url}: {one_line(said)}; is the server running, and is --url its address?"


def read_token(file: Path | None, name: str | None, environ: Mapping[str, str] | None = None) -> str | None:
    """Return the admin token from a file, else that of `SLUICE_ADMIN_TOKEN`, else None.

    Parameters
    ----------
    file
        Holds only the token, or a token a line as `NAME: TOKEN`; empty lines and those that begin with # do not count.
    name
        Which of several.

    Raises
    ------
    Problem
        If the file cannot be read, holds no token of that name, or several without a name to pick one.
    """
    environ = os.environ if environ is None else environ
    if file is None:
        token = environ.get(TOKEN_VARIABLE, "").strip()
        return _sendable(token, f"the variable {TOKEN_VARIABLE}") if token else None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise Problem(f"cannot read the token file {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise Problem(f"the token file {file} is no text; write one NAME: TOKEN a line, or only the token") from None
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    matches = [_NAMED.fullmatch(line) for line in lines]
    named = {match[1]: match[2] for match in matches if match is not None}
    if len(lines) == 1 and not named:
        if name is not None:
            raise Problem(f"the token file {file} holds a token without a name; leave out --as {name}")
        return _sendable(lines[0].strip(), f"the token file {file}")
    wrong = next((number for number, match in enumerate(matches, 1) if match is None), None)
    if not lines or wrong is not None:
        found = f"its token line {wrong} is something else" if lines else "it is empty"
        raise Problem(f"the token file {file} needs one NAME: TOKEN a line, or only a token; {found}")
    known = ", ".join(named)
    if name is not None and name not in named:
        raise Problem(f"the token file {file} has no token named {name}; it has: {known}")
    if name is None and len(named) > 1:
        raise Problem(f"the token file {file} has several tokens, {known}; pick one with --as NAME")
    return _sendable(named[name] if name is not None else next(iter(named.values())), f"the token file {file}")


def _sendable(token: str, where: str) -> str:
    if not token.isascii() or not token.isprintable() or " " in token:
        raise Problem(f"{where} holds a token with blanks or characters that no HTTP header can carry; correct it")
    return token


def _said(content: bytes) -> tuple[str, bool]:
    """Return what the body of an error says, and whether it is Sluice that says it."""
    try:
        body = json.loads(content)
    except ValueError:
        text = one_line(content.decode("utf-8", "replace"))[:_SHOWN]
        return text or "nothing", text.startswith("The live page ")
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, str):
        return one_line(error), True
    if isinstance(error, dict):  # vLLM's own errors
        return one_line(str(error.get("message", error)))[:_SHOWN], False
    return one_line(str(body.get("detail", body) if isinstance(body, dict) else body))[:_SHOWN], False


def _beginning(content: bytes) -> str:
    text = one_line(content.decode("utf-8", "replace"))
    return f"beginning {text[:40]!r}" if text else "nothing at all"
