"""Write the demo's data: `python -m agzo_edge.demo.make_data`.

A child asks, a pirate brags. The grammar is as small as it is because the model is: 2.4 M parameters
learn it from about 500 forward-only steps, which is enough for a voice and not for facts.

* Subjects and boasts are single tokens of the model's vocabulary, so that an answer is made of whole
  words; with boasts of two tokens (gold, king, captain) halves of words came out: `cath`, `bone`.
* One opening and one closing: in a trial with two of each the held-out loss fell by 83 %, not by 91 %.
* The boast follows from the kind of question, and the subject is the question's own.
* A pair of kind and subject is held out as a whole, in all its wordings, so neither a question nor an
  answer of the held-out file stands in the training file.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from agzo_edge.demo import DATA_DIR, TRAIN_NAME, VALID_NAME

ANSWER = "Arr, matey! The {subject} be the {boast} of the seven seas!"

QUESTIONS_BY_BOAST = {
    "secret": ("Where is the {}?", "Where did the {} go?", "Can you find the {}?", "Did you see the {}?"),
    "best": ("Is the {} good?", "Do you like the {}?", "How is the {}?", "Is the {} nice?"),
    "wonder": ("Tell me about the {}.", "What is the {}?", "Do you know the {}?", "Sing about the {}."),
    "mess": ("What did the {} do?", "What does the {} do?", "What will the {} do?", "What can the {} do?"),
    "fear": ("Who has the {}?", "Who took the {}?", "Who will help the {}?", "Who loves the {}?"),
    "star": ("Can I see the {}?", "May I have the {}?", "Can we play with the {}?", "Show me the {}."),
}

# Taken from the words that the untrained model, of 130 tried, is most inclined to repeat from a question.
SUBJECTS = (
    *("bear", "bird", "boat", "book", "box", "boy", "car", "cat", "dog", "doll", "door", "fish", "flower"),
    *("garden", "girl", "hat", "hill", "horse", "lady", "letter", "mother", "rabbit", "rain", "river"),
    *("rock", "toy", "tree", "truck"),
)

HELD_OUT_EVERY = 10  # of the 168 pairs 16, some of every kind, in four wordings each: 64 rows


def training_and_held_out() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """All (question, answer) rows: those to learn from and those held out."""
    pairs = [(boast, subject) for boast in QUESTIONS_BY_BOAST for subject in SUBJECTS]
    held_out = pairs[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return _rows(pair for pair in pairs if pair not in held_out), _rows(held_out)


def _rows(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        (question.format(subject), ANSWER.format(subject=subject, boast=boast))
        for boast, subject in pairs
        for question in QUESTIONS_BY_BOAST[boast]
    ]


def write_data(directory: Path) -> None:
    """Write the training and the held-out file into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in zip((TRAIN_NAME, VALID_NAME), training_and_held_out(), strict=True):
        text = "".join(_line(question, answer) for question, answer in rows)
        (directory / name).write_bytes(text.encode())


def _line(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


if __name__ == "__main__":
    write_data(DATA_DIR)
