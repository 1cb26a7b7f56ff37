"""`generate`, `chat` and `eval`: a model with its adapter at work."""

import sys
from functools import partial
from typing import Annotated

import typer

from agzo_edge.cli.as_json import metrics_object
from agzo_edge.cli.consoles import say, stdout_console, write_json
from agzo_edge.cli.flags import Adapter, AsJson, Prompt, System
from agzo_edge.cli.options import given, sampling_apart, with_settings
from agzo_edge.cli.screen import metrics_table, samples_table
from agzo_edge.errors import ModelError, UsageError


@with_settings("Model", "Memory", sampling=True)
def generate(
    prompt: Prompt,
    adapter: Adapter = None,
    system: System = None,
    ignore_chat_template: Annotated[
        bool | None,
        typer.Option(
            "--ignore-chat-template/--chat-template",
            help="Go on from the prompt as it stands, or answer it by the chat template; by default as the adapter's "
            "rows asked.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer without and with the adapter.")] = False,
    as_json: AsJson = False,
    **settings: object,
) -> None:
    """Write text with a model and its adapter."""
    from agzo_edge import api
    from agzo_edge.cli.quiet import hide_loading_bars

    if compare and adapter is None:
        raise UsageError("--compare answers without and with an adapter: give one with --adapter DIR")
    text = sys.stdin.read() if prompt == "-" else prompt
    sampling, of_model = sampling_apart(settings)
    hide_loading_bars()
    model = api.load(adapter=adapter, **of_model)
    messages = [{"role": "system", "content": system or ""}, {"role": "user", "content": text}]
    answered = partial(
        model.generate,
        text if system is None else messages,
        sampling=sampling,
        ignore_chat_template=ignore_chat_template,
    )
    before = answered(with_adapter=False) if compare else None
    after = answered()
    if as_json:
        write_json({"prompt": text, "text": after} | ({} if before is None else {"without_adapter": before}))
    elif before is not None:
        stdout_console().print(samples_table([{"prompt": text, "before": before, "after": after}]))
    else:
        say(after)


@with_settings("Model", "Memory", sampling=True)
def chat(adapter: Adapter = None, system: System = None, **settings: object) -> None:
    """Talk with a model and its adapter; Ctrl-C ends an answer, /reset forgets the conversation, /exit ends it."""
    from agzo_edge import api
    from agzo_edge.cli.chat import converse
    from agzo_edge.cli.quiet import hide_loading_bars

    sampling, of_model = sampling_apart(settings)
    hide_loading_bars()
    model = api.load(adapter=adapter, **of_model)
    if model.model.tokenizer.chat_template is None:
        raise ModelError(f"{model.model.source}: the tokenizer has no chat template: use `agzo-edge generate --prompt`")
    converse(model, sampling, stdout_console(), system=system)


@with_settings("Model", "Data", "Memory", without=("eval_data",))
def evaluate(adapter: Adapter = None, as_json: AsJson = False, **settings: object) -> None:
    """Score a model with its adapter on data: loss and perplexity, or accuracy and F1, with intervals."""
    from agzo_edge import api
    from agzo_edge.cli.quiet import hide_loading_bars

    hide_loading_bars()
    metrics = api.evaluate(adapter=adapter, **given(settings))
    if as_json:
        write_json(metrics_object(metrics))
    else:
        stdout_console().print(metrics_table(metrics))
