"""What does a mask of padding cost a forward pass, where padding comes last and causality needs none?

    python benchmarks/attention_mask.py [--quick] [--output FILE]

A random Llama of four blocks (hidden 512, 8 heads on 4 key heads), two rows of which one is 20 tokens shorter, without
and with transformers' mask, in turns. `ratio` is the median time without over that with the mask, `quartiles` those of
the ratios of neighbours; `mask MiB` and `kernel MiB` are what the mask takes, as bytes and as the numbers that the
kernel adds; `difference` is that of the valid tokens' states, relative.
"""

import statistics
import time
from collections.abc import Callable

import torch
from environment import environment, leave_result, parser_of
from transformers import LlamaConfig, LlamaModel

from agzo_edge.units import MIB

SHORTER = 20  # tokens of padding in the second row


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def measured(model: LlamaModel, tokens: int, *, repeats: int) -> dict[str, object]:
    """One length, without and with the mask."""
    ids = torch.randint(0, model.config.vocab_size, (2, tokens))
    mask = torch.ones_like(ids)
    mask[1, -SHORTER:] = 0
    states = [
        model(ids, attention_mask=given, use_cache=False).last_hidden_state[mask.bool()] for given in (None, mask)
    ]
    pairs = [
        (
            seconds(lambda: model(ids, use_cache=False)),
            seconds(lambda: model(ids, attention_mask=mask, use_cache=False)),
        )
        for _ in range(repeats)
    ]
    low, _, high = statistics.quantiles([without / with_mask for without, with_mask in pairs], n=4)
    return {
        "tokens": tokens,
        "ratio": statistics.median(pair[0] for pair in pairs) / statistics.median(pair[1] for pair in pairs),
        "quartiles": f"{low:.3f} to {high:.3f}",
        "mask MiB": 2 * tokens**2 / MIB,
        "kernel MiB": 2 * tokens**2 * 4 / MIB,
        "difference": float((states[0] - states[1]).norm() / states[1].norm()),
    }


def main() -> None:
    """Measure every length."""
    parser = parser_of("attention_mask", __doc__ or "")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.repeats = [64], 2
    began = environment()
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = LlamaModel(LlamaConfig(num_hidden_layers=4, vocab_size=8000, **sizes)).eval()
    summary = [measured(model, tokens, repeats=arguments.repeats) for tokens in arguments.tokens]
    leave_result(arguments, began=began, summary=summary)


if __name__ == "__main__":
    main()
