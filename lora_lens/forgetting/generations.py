"""What a causal language model replies to fixed questions, before and after training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
import torch
from jinja2 import TemplateError
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.torch_tools import evaluating
from lora_lens._base.validate import instance, sequence, whole_number
from lora_lens.tasks.tokenizing import bare_tokens, check_tokenizer, special_tokens

# Small models know these, so what training takes from them shows: SmolLM2-135M-Instruct answers all.
QUESTIONS = (
    "What is the capital of France?",
    "What is the capital of Germany?",
    "What is the capital of Japan?",
    "What is the chemical symbol for water?",
    "How many days are in a week?",
    "What is the opposite of hot?",
    "Name three fruits.",
    "Count from one to five.",
    "Write one sentence about the sea.",
    "Complete the sentence: The sun rises in the",
    "What is 2 + 3?",
    "What is 10 + 10?",
)
BATCH = 16  # questions in one pass, 3 times as fast as one by one on one core


def replies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str] = QUESTIONS,
    most_tokens: int = 32,
) -> pd.DataFrame:
    """What the model says to each question, one row each: question and reply.

    The likeliest token is taken every time, whatever the model's generation config says, so the same
    model replies the same to the same list. Questions run together, which changes the rounding: in a
    different batch a question may get another reply where two tokens are equally likely.

    Args:
        model: a causal language model of transformers, or one with adapters from :func:`lora_lens.attach`.
            It runs in evaluation mode and is left as it was.
        tokenizer: the model's. If it has a chat template, each question is a user's message; if not, the
            question itself is what the model continues. Either way the prompt begins as the tokenizer begins
            a text, such as with one beginning-of-text token. It needs no pad token.
        questions: by default 6 facts, 4 instructions and 2 sums.
        most_tokens: the length of a reply at most; it ends earlier at an end token of the model or of the
            tokenizer.

    Raises:
        TypeError: the model is no causal language model, or a question is no string.
        ValueError: there is no question, one is empty, most_tokens is below 1, or question and reply are
            longer than the model's context.

    Example:
        >>> import lora_lens as ll
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?"))
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> config = LlamaConfig(vocab_size=3, eos_token_id=2, num_attention_heads=1, **sizes)
        >>> model = LlamaForCausalLM(config)  # random weights
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        >>> ll.forgetting.replies(model, tokenizer, ["hello"], most_tokens=3).columns.tolist()
        ['question', 'reply']
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not (isinstance(inner, PreTrainedModel) and inner.can_generate()) or inner.config.is_encoder_decoder:
        raise InputTypeError(
            f"{type(inner).__name__} does not continue texts; expected a causal language model, such as "
            "transformers' AutoModelForCausalLM gives"
        )
    _check(questions, most_tokens)
    check_tokenizer(tokenizer)
    prompts = [_prompt(tokenizer, question) for question in questions]
    largest, known = max(map(max, prompts)), inner.get_input_embeddings().num_embeddings
    if largest >= known:
        raise InputError(
            f"the tokenizer gives token {largest}, and {type(inner).__name__} has {known} tokens; use the "
            "tokenizer that belongs to this model"
        )
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    room = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and len(prompts[longest]) + most_tokens > room:
        raise InputError(
            f"question {longest} has {len(prompts[longest])} tokens, with most_tokens={most_tokens} more "
            f"than the {room} that the model takes; shorten it"
        )
    ends = _end_tokens(inner, tokenizer)
    found = []
    with evaluating(inner), _greedy(inner, most_tokens, ends) as config, torch.inference_mode():
        for start in range(0, len(prompts), BATCH):
            for tokens in _continued(inner, prompts[start : start + BATCH], config):
                stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
                found.append(tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip())
    return pd.DataFrame({"question": list(questions), "reply": found})


def replies_before_after(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Two tables of :func:`replies` side by side: question, before, after, and same (bool), letter by letter.

    Args:
        before: what :func:`replies` returned before training.
        after: what it returned afterwards, to the same questions.

    Raises:
        ValueError: a column is missing, or the questions are not the same in the same order.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> before = pd.DataFrame({"question": ["What is 2 + 3?"], "reply": ["5"]})
        >>> ll.forgetting.replies_before_after(before, before.assign(reply="6"))
                 question before after   same
        0  What is 2 + 3?      5     6  False
    """
    for when, table in (("before", before), ("after", after)):
        instance(table, pd.DataFrame, f"the table {when} training", "what replies returned")
        if missing := [column for column in ("question", "reply") if column not in table]:
            raise InputError(
                f"the table {when} training has no column {', '.join(missing)}; pass what replies returned"
            )
    old, new = before["question"].tolist(), after["question"].tolist()
    if old != new:
        row = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), None)
        differ = f"{len(old)} and {len(new)}" if row is None else f"row {row}: {old[row]!r} and {new[row]!r}"
        raise InputError(
            f"the questions before and after training differ ({differ}); ask both models the same"
        )
    old_replies, new_replies = before["reply"].tolist(), after["reply"].tolist()
    same = [a == b for a, b in zip(old_replies, new_replies, strict=True)]
    return pd.DataFrame({"question": old, "before": old_replies, "after": new_replies, "same": same})


def _check(questions: Sequence[str], most_tokens: int) -> None:
    if isinstance(questions, str):
        raise InputTypeError(f"questions must be several strings, not one; write [{questions!r}]")
    if len(sequence(questions, "questions", "strings")) == 0:
        raise InputError("there is no question; pass at least one, or leave questions out for the usual ones")
    for row, question in enumerate(questions):
        if not isinstance(question, str):
            raise InputTypeError(f"question {row} must be a string, not {question!r}")
        if not question.strip():
            raise InputError(f"question {row} is empty; leave it out")
    whole_number(most_tokens, "most_tokens", least=1)


def _prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """What the model goes on from: without what a tokenizer adds at the end, which would stop it."""
    before, _ = special_tokens(tokenizer, question)
    if tokenizer.chat_template is None:
        ids = bare_tokens(tokenizer, [question])[0]
    else:
        message = [{"role": "user", "content": question}]
        try:
            ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise InputError(
                f"the tokenizer's chat template does not take a user's question: {error}; set another one, "
                "or None to let the model continue the questions themselves"
            ) from error
        if ids[: len(before)] == before:  # most templates write it themselves
            before = []
    if not ids:
        raise InputError(
            f"the tokenizer makes no tokens of {question!r}; leave it out, or set a chat template"
        )
    return before + ids


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The model's and the tokenizer's: a chat's turn may end with a token that only one of them knows."""
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, (list, tuple)) else [known]
    return [token for token in dict.fromkeys([*known, tokenizer.eos_token_id]) if token is not None]


@contextmanager
def _greedy(model: PreTrainedModel, most_tokens: int, ends: list[int]) -> Iterator[GenerationConfig]:
    """Settings of greedy decoding, which the model has as its own for a while.

    ``generate`` fills what a given config leaves open from the model's, such as a repetition penalty.
    """
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=most_tokens,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    own = model.generation_config
    model.generation_config = config
    try:
        yield config
    finally:
        model.generation_config = own


def _continued(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig
) -> list[list[int]]:
    """What follows each prompt, with padding behind the end."""
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), config.pad_token_id)  # masked, so any token would do
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padding on the left: a reply goes on from the last column
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    return model.generate(ids, attention_mask=mask, generation_config=config)[:, length:].tolist()
