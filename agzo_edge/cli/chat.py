"""A conversation at the prompt."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from agzo_edge.errors import ModelError

if TYPE_CHECKING:
    from agzo_edge.config import Sampling
    from agzo_edge.serve.generate import TextModel


def converse(model: "TextModel", sampling: "Sampling", console: Console) -> None:
    """Answer line by line until /exit or the end of the input; the history goes along, /reset forgets it."""
    messages: list[dict[str, str]] = []
    if console.is_terminal:
        console.print("/reset forgets the conversation, /exit or Ctrl-D ends it", style="dim")
    while (line := _line(console)) is not None:
        if line == "/reset":
            messages = []
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = model.generate(messages, sampling=sampling)
            except ModelError as error:  # a conversation that has grown too long can be begun anew
                messages.pop()
                console.print(Text(f"{error}; or /reset"), style="yellow")
                continue
            messages.append({"role": "assistant", "content": answer})
            console.print(Text(answer), style="green", soft_wrap=True)


def _line(console: Console) -> str | None:
    """The next line that the user enters; None at the end."""
    try:
        line = console.input(Text("> ", "bold") if console.is_terminal else "").strip()
    except EOFError:
        return None
    return None if line == "/exit" else line
