"""From a source's raw rows to examples, one at a time: mapped, checked, tokenised, fitted."""

from transformers import PreTrainedTokenizerBase

from agzo_edge.budget.facts import ModelFacts
from agzo_edge.config import RunConfig
from agzo_edge.errors import DataError
from agzo_edge.train.conversation import require_chat_template
from agzo_edge.train.data import NO_FIELDS, Example, Sample
from agzo_edge.train.formats import SoundRow, answer_index, checked_row
from agzo_edge.train.length import fitted_prompt, fitted_rows, longest_tokens
from agzo_edge.train.mapping import mapped_row
from agzo_edge.train.rows import BrokenRow, RawRow
from agzo_edge.train.tally import Made
from agzo_edge.train.template import Asking, asking_of, needs_chat_template, token_rows
from agzo_edge.train.tokens import TokenRow, label_runs


class ExampleMaker:
    """Makes examples of a source's raw rows, as the settings say."""

    def __init__(
        self, source: str, tokenizer: PreTrainedTokenizerBase, config: RunConfig, *, facts: ModelFacts | None = None
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.config = config
        self.facts = facts
        self._first: SoundRow | None = None  # the others must have its format

    @property
    def format(self) -> str:
        """The format of the source's rows, once one was sound."""
        return self._first.format if self._first else ""

    @property
    def asking(self) -> Asking | None:
        """How the source's rows ask the model, once one was sound."""
        return asking_of(self._first, self.tokenizer) if self._first else None

    def made(self, row: RawRow | BrokenRow) -> Made:
        """The example of a row. Raises DataError for what would be wrong with every row."""
        mapped = row if isinstance(row, BrokenRow) else mapped_row(row, self.config)
        if isinstance(mapped, BrokenRow):
            return Made(fault=mapped.fault)
        sound = checked_row(mapped, self.config.objective, first=self._first)
        if isinstance(sound, str):
            return Made(fault=sound)
        self._first = self._first or sound
        if needs_chat_template(sound.fields, sound.format):
            require_chat_template(self.tokenizer, self.source)
        try:
            rows = self._token_rows(sound)
        except DataError as error:
            return Made(fault=str(error))
        return self._fitted(sound, rows)

    def _token_rows(self, row: SoundRow) -> tuple[TokenRow, ...]:
        """The tokens of a row. Raises DataError, without a place, for what cannot be made tokens of the model."""
        mask_prompt, train_on = self.config.mask_prompt, self.config.train_on
        rows = token_rows(row.fields, row.format, self.tokenizer, mask_prompt=mask_prompt, train_on=train_on)
        highest = max(int(each.input_ids.max(initial=0)) for each in rows)
        if self.facts is not None and highest >= self.facts.vocab_size:
            raise DataError(f"token {highest} of {self.facts.vocab_size:,} words: the tokenizer is not the model's")
        return rows

    def _fitted(self, row: SoundRow, rows: tuple[TokenRow, ...]) -> Made:
        """The example of a row's tokens, cut or dropped where they are too many."""
        longest = longest_tokens(rows)
        limit, overlong, bos_id = self.config.max_seq_length, self.config.overlong, self.tokenizer.bos_token_id
        try:
            if row.format == "prompt":
                fitted = fitted_prompt(rows[0], limit=limit, overlong=overlong)
            else:
                fitted = fitted_rows(rows, limit=limit, overlong=overlong, bos_id=bos_id)
        except DataError as error:
            return Made(fault=str(error), longest_tokens=longest)
        if not fitted:
            return Made(longest_tokens=longest)
        answer = answer_index(row.fields["options"], row.fields["answer"]) if row.format == "choice" else 0
        assert answer is not None  # checked_row let it through
        fields = row.fields if row.format == "prompt" else NO_FIELDS
        is_cut = longest > limit
        return Made(Example(fitted, answer, row.place, fields), truncated=is_cut, longest_tokens=longest)


def sample_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """An example's row, the right one of its options, as text: stretches, and whether each is learned.

    Each is what it adds to those before it: by itself a stretch would lose the blank that it begins with.
    """
    stretches: list[tuple[str, bool]] = []
    ids: list[int] = []
    before = ""
    for some, learned in label_runs(example.rows[example.answer]):
        ids += some.tolist()
        text = str(tokenizer.decode(ids))
        stretches.append((text[len(before) :], learned))
        before = text
    return tuple(stretches)
