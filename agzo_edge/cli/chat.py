"""A conversation at the prompt."""

from contextlib import suppress
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from agzo_edge.cli.stop import interruptible
from agzo_edge.errors import ModelError

if TYPE_CHECKING:
    from agzo_edge.config import Sampling
    from agzo_edge.serve.generate import TextModel


def converse(model: "TextModel", sampling: "Sampling", console: Console, *, system: str | None = None) -> None:
    """Answer line by line until /exit or the end of the input; the history goes along, /reset forgets it."""
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    if console.is_terminal:
        console.print("Ctrl-C ends an answer, /reset forgets the conversation, /exit or Ctrl-D ends it", style="dim")
    while (line := _line(console)) is not None:
        if line == "/reset":
            messages = list(start)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(model, messages, sampling, console)
            except ModelError as error:  # a conversation that has grown too long can be begun anew
                messages.pop()
                console.print(Text(f"{error}; or /reset"), style="yellow")
                continue
            messages.append({"role": "assistant", "content": answer})


def _answer(model: "TextModel", messages: list[dict[str, str]], sampling: "Sampling", console: Console) -> str:
    """The answer, shown while it is written; Ctrl-C leaves it at what is there."""
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        console.out(piece, style="green", highlight=False, end="")

    with suppress(KeyboardInterrupt), interruptible():
        model.generate(messages, sampling=sampling, on_text=show)
    console.out("")
    return "".join(pieces).strip()


def _line(console: Console) -> str | None:
    """The next line that the user enters; None at the end."""
    try:
        line = console.input(Text("> ", "bold") if console.is_terminal else "").strip()
    except EOFError:
        return None
    return None if line == "/exit" else line
