"""A reward in a process of its own, asked from this one, with a time limit for each answer."""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from agzo_edge.errors import ConfigError, RewardError

START_TIMEOUT_S = 60.0  # a module of the user's may import a lot


@dataclass(frozen=True)
class Question:
    """A text to be judged."""

    prompt: Any  # as the row has it: a string, or messages
    text: str
    row: Mapping[str, Any]
    place: str  # "notes.jsonl:12"


class Judge:
    """A reward's process. Close it, or leave it to end with this one: it ends when its input does."""

    def __init__(self, spec: str, *, argument: str | None, answer_field: str, timeout_s: float) -> None:
        """Start the process and load the reward. Raises ConfigError when it cannot be loaded."""
        self.spec = spec
        self.timeout_s = timeout_s
        self._process = subprocess.Popen(
            [sys.executable, "-m", "agzo_edge.train.reward_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C at the terminal is for the run, which ends after its step
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._write({"reward": spec, "argument": argument, "answer_field": answer_field})
        told = self._answer(START_TIMEOUT_S)
        if "error" in told:
            self.close()
            raise ConfigError(f"reward {spec!r} cannot be used: {told['error']}")

    def rewards(self, questions: Sequence[Question]) -> list[float]:
        """The rewards of texts. Raises RewardError, naming the row, for the first that has none."""
        return [self._reward(question) for question in questions]

    def _reward(self, question: Question) -> float:
        self._write({"prompt": question.prompt, "text": question.text, "row": dict(question.row)})
        told = self._answer(self.timeout_s)
        if "error" in told:
            self.close()  # after a missed answer the next would be taken for it
            raise RewardError(f"{question.place}: reward {self.spec!r} {told['error']}")
        return float(told["reward"])

    def _write(self, value: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value, default=str) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass  # it has ended, and the missing answer says so

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line, or what kept it from coming."""
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            return {"error": f"took longer than {timeout_s:g} s: raise --reward-timeout-s, or look at it"}
        if not line:
            self._answers.put("")
            return {"error": f"ended its process (exit code {self._process.wait()})"}
        told: dict[str, Any] = json.loads(line)
        return told

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # what was still to be written, to a process that had ended
                    stream.close()
