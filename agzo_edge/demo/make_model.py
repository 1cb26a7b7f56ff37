"""Write the demo's model: `python -m agzo_edge.demo.make_model TINY_NOVELS_DIR`.

The source model saw <|endoftext|> at the end of each document and never saw <|im_end|>: that token's
embedding lay among many others that no text had moved, at a cosine of 1.0, and as the output head is
the same matrix, no low-rank change of the layers could have told them apart: answers never ended.
So the two rows change places. What the model knows of an end now belongs to <|im_end|>; every other
number is the source's.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save

from agzo_edge.demo import MODEL_DIR

END_OF_TEXT, END_OF_TURN = 0, 2  # ids of <|endoftext|> and <|im_end|>

# ChatML. The marks say what is learned: the assistant's words and the token that ends them.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_model(source: Path, directory: Path) -> None:
    """Copy `source` into `directory`, with the end rows exchanged and the chat template added."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]  # (vocabulary, hidden), also the head
    embedding[[END_OF_TEXT, END_OF_TURN]] = embedding[[END_OF_TURN, END_OF_TEXT]]
    (directory / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    shutil.copyfile(source / "tokenizer.json", directory / "tokenizer.json")
    _copy_json(source, directory, "config.json", eos_token_id=END_OF_TURN)
    ends = [END_OF_TURN, END_OF_TEXT]
    _copy_json(source, directory, "generation_config.json", eos_token_id=ends, use_cache=True)
    _copy_json(
        source,
        directory,
        "tokenizer_config.json",
        chat_template=CHAT_TEMPLATE,
        eos_token="<|im_end|>",
        model_max_length=1024,
    )


def _copy_json(source: Path, directory: Path, name: str, **changes: object) -> None:
    settings = json.loads((source / name).read_text(encoding="utf-8")) | changes
    (directory / name).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m agzo_edge.demo.make_model TINY_NOVELS_DIR")
    write_model(Path(sys.argv[1]), MODEL_DIR)
