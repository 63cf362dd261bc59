"""`hf-paged chat`: talk to a server in the terminal. Any server of OpenAI's protocol will do."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import httpx
from rich.console import Console

from hf_paged.errors import ConfigError, HFPagedError
from hf_paged.server.printable import printable

HELP = "/reset begins anew, /undo takes the last turn back, /system TEXT sets the system prompt, /quit or Ctrl-D ends"


class Conversation:
    """The turns so far, and the server that answers them.

    Args:
        client: of HTTP, with the server's address and key.
        model: the name to ask for.
        options: further fields of each call.
    """

    def __init__(self, client: httpx.Client, model: str, options: dict[str, Any]) -> None:
        self.messages: list[dict[str, str]] = []
        self._client = client
        self._model = model
        self._options = options

    def set_system(self, text: str) -> None:
        """Set the system prompt, or take it away."""
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def reset(self) -> None:
        """Forget all but the system prompt."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def undo(self) -> None:
        """Forget the last question and its answer."""
        while self.messages and self.messages[-1]["role"] != "system" and self.messages.pop()["role"] != "user":
            pass

    def say(self, text: str) -> Iterator[str]:
        """The answer to a turn, piece by piece. What was said before an interrupt stays in the conversation.

        Raises:
            HFPagedError: the server refused, or broke off.
        """
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            for piece in self._stream():
                said.append(piece)
                yield piece
        except HFPagedError:
            self.messages.pop()
            raise
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": "".join(said)})

    def _stream(self) -> Iterator[str]:
        body = {"model": self._model, "messages": self.messages, "stream": True, **self._options}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise HFPagedError(f"{response.status_code}: {_message(response.read())}")
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield from _pieces(json.loads(line[6:]))
        except httpx.HTTPError as error:
            raise HFPagedError(f"{self._client.base_url}: {error}") from error


def _pieces(chunk: dict[str, Any]) -> Iterator[str]:
    if "error" in chunk:
        raise HFPagedError(chunk["error"]["message"])
    for choice in chunk["choices"]:
        if text := choice["delta"].get("content"):
            yield text


def _message(body: bytes) -> str:
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:300]


def run(args: argparse.Namespace) -> int:
    """Talk until the user ends it; the exit status."""
    console = Console()
    key = args.api_key or os.environ.get("HF_PAGED_API_KEY", "").split(",")[0]
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=args.url.rstrip("/"), headers=headers, timeout=httpx.Timeout(600, connect=10)) as client:
        conversation = Conversation(client, args.model or _first_model(client), _options(args))
        if args.system:
            conversation.set_system(args.system)
        if args.message:
            _answer(console, conversation, args.message)
            return 0
        console.print(f"[dim]{HELP}[/dim]", highlight=False)
        with contextlib.suppress(EOFError):
            while _turn(console, conversation):
                pass
    return 0


def _turn(console: Console, conversation: Conversation) -> bool:
    """One turn; whether another one follows."""
    command, _, rest = console.input("[bold]> [/bold]").strip().partition(" ")
    if command in ("/quit", "/exit"):
        return False
    if command == "/reset":
        conversation.reset()
    elif command == "/undo":
        conversation.undo()
    elif command == "/system":
        conversation.set_system(rest)
    elif command.startswith("/"):
        console.print(HELP, highlight=False, markup=False)
    elif command:
        with contextlib.suppress(KeyboardInterrupt):  # ends the answer, not the conversation
            _answer(console, conversation, f"{command} {rest}".strip(), alone=False)
        console.print()
    return True


def _answer(console: Console, conversation: Conversation, text: str, *, alone: bool = True) -> None:
    try:
        for piece in conversation.say(text):
            console.out(_shown(piece) if console.is_terminal else piece, end="", highlight=False)
    except HFPagedError as error:
        if alone:
            raise
        console.print(f"error: {_shown(str(error))}", style="red", markup=False)
        return
    if alone:
        console.print()


def _shown(text: str) -> str:
    """An answer on a terminal: with escapes for control codes, which could rewrite what is on the screen."""
    return printable(text, keep="\n\t")


def _first_model(client: httpx.Client) -> str:
    try:
        response = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise ConfigError(f"no server answers at {client.base_url}: {error}") from error
    if response.status_code != 200:
        raise ConfigError(f"{client.base_url} answers {response.status_code}: {_message(response.content)}")
    return response.json()["data"][0]["id"]


def _options(args: argparse.Namespace) -> dict[str, Any]:
    given = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens, "seed": args.seed}
    return {name: value for name, value in given.items() if value is not None}
