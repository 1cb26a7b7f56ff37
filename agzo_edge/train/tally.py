"""The account of a source: what became of each of its rows, and what is to be said of them together."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from agzo_edge.errors import numbered
from agzo_edge.train.data import DataReport, Example
from agzo_edge.train.length import Overlong, longest_tokens


@dataclass(frozen=True)
class Made:
    """What became of a row: an example, or a fault, or neither when it was dropped."""

    example: Example | None = None
    fault: str = ""
    truncated: bool = False
    longest_tokens: int = 0  # before anything was cut


@dataclass
class Tally:
    """What has become of the rows seen so far; no example is kept but the largest."""

    n_largest: int = 1
    faults: dict[str, list[str]] = field(default_factory=dict)  # each fault's places
    rows_seen: int = 0
    rows_used: int = 0
    rows_truncated: int = 0
    longest_tokens: int = 0  # before anything is cut
    longest_refused: int = 0
    longest_used: int = 0
    label_tokens: int = 0
    tokens: int = 0
    rows_per_example: int = 1
    _largest: list[tuple[int, int, Example]] = field(default_factory=list)  # a heap: tokens, number, example

    def add(self, place: str, made: Made) -> None:
        """Take in what became of a row."""
        self.rows_seen += 1
        self.longest_tokens = max(self.longest_tokens, made.longest_tokens)
        if made.fault:
            self.longest_refused = max(self.longest_refused, made.longest_tokens)
            self.faults.setdefault(made.fault, []).append(place)
        elif made.example is not None:
            self.rows_truncated += made.truncated
            self._use(made.example)

    def _use(self, example: Example) -> None:
        longest = longest_tokens(example.rows)
        self.rows_used += 1
        self.longest_used = max(self.longest_used, longest)
        self.label_tokens += example.label_tokens
        self.tokens += sum(len(row.input_ids) for row in example.rows)
        self.rows_per_example = max(self.rows_per_example, len(example.rows))
        heapq.heappush(self._largest, (longest * len(example.rows), self.rows_used, example))
        if len(self._largest) > self.n_largest:
            heapq.heappop(self._largest)

    def largest(self) -> tuple[Example, ...]:
        """The examples that take most of a pass, the largest last."""
        return tuple(example for _, _, example in sorted(self._largest, key=lambda entry: entry[:2]))

    def complaint(self, limit_tokens: int, *, overlong: Overlong = "error", room_tokens: int | None = None) -> str:
        """Why these rows cannot be trained on; empty when they can. The model has `room_tokens` for a row."""
        if self.faults:
            counted = f"{sum(map(len, self.faults.values())):,} of {self.rows_seen:,} rows cannot be used"
            ways = "--overlong truncate or drop" if overlong == "error" else "--overlong drop"
            advice = f"\nthe longest has {self.longest_refused:,} tokens"
            if room_tokens is not None and self.longest_refused > room_tokens:
                advice += f", and the model positions for {room_tokens:,}: {ways}"
            else:
                advice += f": --max-seq-length {self.longest_refused}, or {ways}"
            told = numbered([_told(fault, places) for fault, places in self.faults.items()])
            return f"{counted}:\n{told}" + advice * (self.longest_refused > limit_tokens)
        if not self.rows_seen:
            return "holds no rows"
        if not self.rows_used:
            return (
                f"no row is left: all {self.rows_seen:,} have over {limit_tokens:,} tokens or no label token "
                f"(the longest has {self.longest_tokens:,}): raise --max-seq-length"
            )
        return ""

    def report(
        self,
        row_format: str,
        *,
        padding: float,
        lines_in_file: int | None = None,  # of a file whose other rows wait until they are needed
    ) -> DataReport:
        """The account of the rows seen."""
        return DataReport(
            format=row_format,
            rows_read=self.rows_seen if lines_in_file is None else lines_in_file,
            rows_used=self.rows_used,
            rows_truncated=self.rows_truncated,
            rows_dropped=self.rows_seen - self.rows_used,
            label_tokens=self.label_tokens,
            longest_tokens=self.longest_used,
            tokens=self.tokens,
            padding_share=round(padding, 4),
            rows_per_example=self.rows_per_example,
            streamed=lines_in_file is not None,
        )


def _told(fault: str, places: Sequence[str]) -> str:
    """A fault with the row that has it, or with the first of them."""
    others = f" (and {len(places) - 1:,} more rows)" if len(places) > 1 else ""
    return f"{places[0]}: {fault}{others}"
