from __future__ import annotations

import copy

import pytest
import torch
from one_weight import moved
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import lora_lens as ll
from lora_lens.forgetting.generations import QUESTIONS, replies, replies_before_after

FRANCE = "What is the capital of France?"


@pytest.fixture(scope="module")
def smollm2() -> LlamaForCausalLM:
    return ll.tasks.bundled.smollm2()


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2.name_or_path, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def answers(smollm2, tokenizer):
    return replies(smollm2, tokenizer)


@pytest.fixture
def small(tokenizer) -> LlamaForCausalLM:
    """Untrained, and with rounding so small that a batch says what its rows say alone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def test_smollm2_answers_all_questions(answers):
    assert answers.columns.tolist() == ["question", "reply"]
    assert answers["question"].tolist() == list(QUESTIONS)
    known = ["Paris", "Berlin", "Tokyo", "H2O", "7", "cold", "Banana", "5", "sea", "sky", "= 5", "= 20"]
    assert [word in reply for word, reply in zip(known, answers["reply"], strict=True)] == [True] * 12


def test_a_reply_is_what_generate_writes(smollm2, tokenizer, answers):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": FRANCE}], add_generation_prompt=True, return_tensors="pt"
    )
    written = smollm2.generate(**prompt, do_sample=False, max_new_tokens=32)[
        0, prompt["input_ids"].shape[1] :
    ]
    assert written[-1] == tokenizer.eos_token_id
    assert answers["reply"][0] == tokenizer.decode(written[:-1]) == "The capital of France is Paris."


def test_an_adapted_model_says_the_same_until_it_is_trained(smollm2, tokenizer, answers):
    adapted = ll.attach(smollm2, ll.Window.middle(rank=8), targets="v_proj")
    adapted.train()
    modes = [module.training for module in adapted.modules()]
    compared = replies_before_after(answers.head(4), replies(adapted, tokenizer, QUESTIONS[:4]))
    assert compared.columns.tolist() == ["question", "before", "after", "same"]
    assert compared["same"].tolist() == [True] * 4
    assert [module.training for module in adapted.modules()] == modes
    changed = replies_before_after(answers.head(3), replies(moved(adapted, 0.5), tokenizer, QUESTIONS[:3], 8))
    assert changed["before"][0] == "The capital of France is Paris."
    assert changed["after"][0] != changed["before"][0]
    assert changed["same"].tolist() == (changed["before"] == changed["after"]).tolist()


def test_it_stops_at_any_end_token_and_leaves_the_settings(smollm2, tokenizer, monkeypatch):
    own = copy.deepcopy(smollm2.generation_config)
    (is_token,) = tokenizer.encode(" is")
    own.eos_token_id = [0, is_token]
    monkeypatch.setattr(smollm2, "generation_config", own)
    said = replies(smollm2, tokenizer, [FRANCE, "What is 2 + 3?"])["reply"].tolist()
    assert said == ["The capital of France", "2 + 3 = 5"]  # at the model's and at the tokenizer's
    assert smollm2.generation_config is own


def test_without_a_template_the_model_goes_on_with_the_text(smollm2, tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    reply = replies(smollm2, plain, ["The capital of France is", "One, two, three, four,"], most_tokens=2)
    assert reply["reply"][0].startswith("Paris")
    assert reply["reply"][1].startswith("five")


def test_settings_for_sampling_count_for_nothing(small, tokenizer, capfd):
    plain = copy.deepcopy(tokenizer)
    plain.pad_token = None
    expected = replies(small, plain, most_tokens=6)
    assert plain.pad_token is None
    small.generation_config.update(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, num_beams=2, max_length=7
    )
    kept = small.generation_config.to_dict()
    assert replies(small, plain, most_tokens=6).equals(expected)
    assert small.generation_config.to_dict() == kept
    assert capfd.readouterr().err == ""


def test_company_and_padding_make_no_difference(small, tokenizer):
    questions = [f"{'very ' * (i % 7)}long {i}?" for i in range(19)]  # more than one batch
    together = replies(small, tokenizer, questions, most_tokens=5)
    alone = [replies(small, tokenizer, [question], most_tokens=5)["reply"][0] for question in questions]
    assert together["reply"].tolist() == alone
    assert len(set(alone)) > 10


def test_the_same_questions_are_compared(answers):
    with pytest.raises(ValueError, match=r"questions .* differ \(12 and 11\); ask both models the same"):
        replies_before_after(answers, answers.head(11))
    with pytest.raises(
        ValueError, match=r"differ \(row 0: 'What is the capital of France\?' and 'What is 10"
    ):
        replies_before_after(answers, answers.iloc[::-1])
    with pytest.raises(ValueError, match="the table after training has no column reply; pass what replies"):
        replies_before_after(answers, answers[["question"]])


@pytest.mark.parametrize(
    ("questions", "most_tokens", "error", "message"),
    [
        (
            FRANCE,
            8,
            TypeError,
            r"must be several strings, not one; write \['What is the capital of France\?'\]",
        ),
        ([], 8, ValueError, "there is no question"),
        ([FRANCE, 3], 8, TypeError, "question 1 must be a string, not 3"),
        ([FRANCE, " "], 8, ValueError, "question 1 is empty"),
        ([FRANCE], 0, ValueError, "most_tokens must be at least 1, not 0"),
        (
            [FRANCE, "a " * 90],
            8,
            ValueError,
            r"question 1 has \d+ tokens, with most_tokens=8 more than the 128",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(small, tokenizer, questions, most_tokens, error, message):
    with pytest.raises(error, match=message):
        replies(small, tokenizer, questions, most_tokens)


def test_only_models_that_continue_texts_are_asked(small, tokenizer, model):
    config = T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    for other in (small.model, T5ForConditionalGeneration(config), model):
        with pytest.raises(
            TypeError, match=f"{type(other).__name__} does not continue texts; expected a causal"
        ):
            replies(other, tokenizer)


def test_tokenizers_that_do_not_fit_are_refused_in_words(small, tokenizer):
    other = copy.deepcopy(small)
    other.resize_token_embeddings(100)
    with pytest.raises(ValueError, match=r"gives token \d+, and LlamaForCausalLM has 100 tokens"):
        replies(other, tokenizer, [FRANCE])
    for template, message in (
        ("{{ raise_exception('no users') }}", "template does not take a user's question: no users; set"),
        ("{% for m in %}", "template does not take a user's question"),
        ("{{ '' }}", "the tokenizer makes no tokens of 'What is the capital"),
    ):
        odd = copy.deepcopy(tokenizer)
        odd.chat_template = template
        with pytest.raises(ValueError, match=message):
            replies(small, odd, [FRANCE])
