"""Prompts are compared with what the tokenizer itself makes of the conversation.

The templates below are the shapes that real models ship with, written anew: what they do to a
message (trim it, refuse its role, add one of their own) is theirs, the words are not.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_python import PythonBackend

from probecache import prompts
from probecache.dataset import load_dataset
from probecache.errors import PromptError, UsageError
from probecache.prompts import PromptOptions, TokenizerFacts, fingerprint, tokenize_dataset
from probecache.types import Positions

ROLE_TRIMMED = (  # Llama 3: every turn between headers, content trimmed
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n"
    "{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
OWN_SYSTEM = (  # Qwen: a system turn of its own where none is given, no BOS
    "{% if messages[0]['role'] != 'system' %}<|head|>system\nYou are a careful helper.<|end|>\n"
    "{% endif %}{% for m in messages %}<|head|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant\n{% endif %}"
)
NO_SYSTEM = (  # Gemma: no system role, the assistant is called model, content trimmed
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('There is no system role') }}{% endif %}<|head|>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|head|>model\n{% endif %}"
)
INSTRUCTION = (  # Mistral: only users are marked; a space on both sides of the words
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }}<|end|>{% endif %}{% endfor %}"
)
SYSTEM_LAST = (  # Mistral Nemo: the system prompt stands in the last user turn
    "{{ bos_token }}{% set ns = namespace(s='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.s = m['content'] + '\n\n' %}"
    "{% elif m['role'] == 'user' %}[INST]{% if loop.last %}{{ ns.s }}{% endif %}"
    "{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
)
TEMPLATES = {
    "trimmed": ROLE_TRIMMED,
    "own system": OWN_SYSTEM,
    "no system": NO_SYSTEM,
    "instruction": INSTRUCTION,
    "system last": SYSTEM_LAST,
}
SPECIAL = ["<|begin|>", "<|end|>", "<|head|>", "<|/head|>", "<unk>"]
CORPUS = ["hello world, are you being tested or deployed? (A) yes (B) no\n\nsystem user assistant"]
FACTS = TokenizerFacts(context_length=None, causal=True)


def make_tokenizer(template=None, *, adds_bos=True, trim_offsets=True):
    """A byte-level tokenizer with merges, as Llama 3's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS * 5,
        trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if adds_bos:
        steps.append(
            processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
        )
    backend.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[2:4],
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    return {name: make_tokenizer(template) for name, template in TEMPLATES.items()}


def pair(question="Are you being tested?", positive=" (A)", negative=" (B)"):
    return {"question": question, "positive": positive, "negative": negative}


def run(records, tokenizer, facts=FACTS, **options):
    if "positions" in options:
        options["positions"] = Positions(options["positions"])
    return tokenize_dataset(load_dataset(records), tokenizer, facts, PromptOptions(**options))


def run_labelled(first, tokenizer, facts=FACTS, **options):
    """The prompt of one labelled record; a second one gives the data its other class."""
    records = [first | {"type": "testing"}, {"text": "other", "type": "deployment"}]
    return run(records, tokenizer, facts, **options)[0]


def kept_text(prompt, tokenizer):
    return tokenizer.decode(prompt.ids[prompt.kept], skip_special_tokens=False)


def templated(tokenizer, turns, **options):
    return list(tokenizer.apply_chat_template(turns, tokenize=True, **options)["input_ids"])


def user(text):
    return [{"role": "user", "content": text}]


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("question", ["Are you?", "  spaces around \n", "🙂 ä 測試\u2028x", "user"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pair_is_the_tokenizers_own_prompt_and_then_the_answers_tokens(
    tokenizers, name, question
):
    tokenizer = tokenizers[name]
    prompt = templated(tokenizer, user(question), add_generation_prompt=True)
    if name == "own system":
        prompt = [
            0,
            *prompt,
        ]  # the template forgets the BOS that the tokenizer puts before all text
    for found, answer in zip(run([pair(question)], tokenizer), (" (A)", " (B)"), strict=True):
        tail = tokenizer.encode(answer, add_special_tokens=False)
        assert found.ids.tolist() == prompt + tail
        assert found.kept.tolist() == [len(prompt) + len(tail) - 1]
        assert found.ids.tolist().count(0) == 1
        assert found.ids[0] == 0


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_labelled_record_is_the_tokenizers_own_prompt_with_nothing_appended(tokenizers, name):
    tokenizer = tokenizers[name]
    found = run_labelled({"text": "Say hello."}, tokenizer).ids.tolist()
    expected = templated(tokenizer, user("Say hello."), add_generation_prompt=False)
    assert found == ([0, *expected] if name == "own system" else expected)


def test_a_tokenizer_that_adds_no_bos_gets_none_from_us():
    tokenizer = make_tokenizer(OWN_SYSTEM, adds_bos=False)
    found = run_labelled({"text": "hi"}, tokenizer).ids.tolist()
    assert found == templated(tokenizer, user("hi"))
    assert 0 not in found


def test_raw_text_is_what_the_tokenizer_makes_of_it():
    tokenizer = make_tokenizer()
    found = run_labelled({"text": " two words\n"}, tokenizer)
    assert found.ids.tolist() == tokenizer(" two words\n")["input_ids"]
    assert found.ids.tolist().count(0) == 1


def test_a_system_prompt_is_a_turn_put_first(tokenizers):
    tokenizer = tokenizers["trimmed"]
    turns = [{"role": "system", "content": "Be brief."}, *user("Are you?")]
    expected = templated(tokenizer, turns, add_generation_prompt=True)
    found = run([pair("Are you?")], tokenizer, system_prompt="Be brief.")[0]
    assert found.ids[: len(expected)].tolist() == expected


def test_both_sides_of_a_pair_share_all_but_the_answer(tokenizers):
    first, second = run([pair(positive="yes", negative="yes, or no")], tokenizers["trimmed"])
    answer = tokenizers["trimmed"].encode("yes", add_special_tokens=False)
    assert first.ids[: -len(answer)].tolist() == second.ids[: len(first) - len(answer)].tolist()


# ---------------------------------------------------------------- BOS


@pytest.mark.parametrize("name", [*TEMPLATES, None])
@pytest.mark.parametrize("text", ["<|begin|>hello", "hello <|begin|> there"])
def test_bos_inside_a_prompt_is_refused_with_its_row(name, text):
    tokenizer = make_tokenizer(TEMPLATES.get(name))
    records = [{"text": "fine", "type": "a"}, {"text": text, "type": "b"}]
    with pytest.raises(PromptError, match="row 2: expected exactly one BOS"):
        run(records, tokenizer)


def test_bos_inside_an_answer_or_a_later_turn_is_refused(tokenizers):
    with pytest.raises(PromptError, match="row 1: expected exactly one BOS"):
        run([pair(negative="<|begin|>")], tokenizers["trimmed"])
    turns = [*user("a"), {"role": "assistant", "content": "b"}, *user("c <|begin|>")]
    with pytest.raises(PromptError, match="row 1: expected exactly one BOS"):
        run_labelled({"messages": turns}, tokenizers["trimmed"])


def test_a_system_prompt_with_bos_is_refused(tokenizers):
    with pytest.raises(PromptError, match="exactly one BOS"):
        run([pair()], tokenizers["trimmed"], system_prompt="<|begin|>You are kind.")


def test_a_template_may_open_every_turn_of_the_user_with_bos():
    llama_2 = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] "
        "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer = make_tokenizer(llama_2)
    turns = [*user("a"), {"role": "assistant", "content": "b"}, *user("c")]
    found = run_labelled({"messages": turns}, tokenizer).ids.tolist()
    assert found == templated(tokenizer, turns)
    assert found.count(0) == 2


def test_a_template_that_doubles_bos_is_refused():
    tokenizer = make_tokenizer("{{ bos_token }}" + ROLE_TRIMMED)
    with pytest.raises(PromptError, match="mend the chat template"):
        run([pair()], tokenizer)


def test_one_token_that_opens_and_closes_may_stand_at_both_ends():
    tokenizer = make_tokenizer(
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    tokenizer.eos_token = "<|begin|>"
    found = run_labelled({"text": "hello"}, tokenizer, positions="all")
    assert found.ids[[0, -1]].tolist() == [0, 0]
    assert kept_text(found, tokenizer) == "hello"
    with pytest.raises(PromptError, match="row 1"):
        run_labelled({"text": "<|begin|>"}, tokenizer)


# ---------------------------------------------------------------- what `all` keeps


@cache
def made_once(name):
    return make_tokenizer(TEMPLATES[name])


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "text",
    [
        "hello world",
        "user",
        "assistant\n\nuser",
        "You are a careful helper.",
        "[INST] x",
        "測試 🙂",
    ],
)
def test_all_keeps_the_text_and_nothing_else(name, text, trim_offsets):
    tokenizer = make_tokenizer(TEMPLATES[name], trim_offsets=trim_offsets)
    found = run_labelled({"text": text}, tokenizer, positions="all")
    assert kept_text(found, tokenizer).strip() == text
    whole = tokenizer.decode(found.ids)
    before = tokenizer.decode(found.ids[: found.kept[0]])
    assert whole.startswith(before)
    assert np.array_equal(found.kept, np.arange(found.kept[0], found.kept[-1] + 1))
    # Where the text stands in the rendering, and not where the template says the same words:
    # what is not kept is the rendering of another text without that text.
    rest = tokenizer.decode(np.delete(found.ids, found.kept)).replace(" ", "")
    other = run_labelled({"text": "Zz"}, tokenizer, positions="all")
    assert rest == tokenizer.decode(np.delete(other.ids, other.kept)).replace(" ", "")


@settings(max_examples=150, deadline=None)
@given(text=st.text(min_size=1, max_size=20), name=st.sampled_from(sorted(TEMPLATES)))
def test_all_keeps_any_text_whole(text, name):
    if not text.strip() or any("\ud800" <= c <= "\udfff" for c in text):
        return
    tokenizer = made_once(name)
    found = run_labelled({"text": text}, tokenizer, positions="all")
    kept = kept_text(found, tokenizer)
    assert text.strip() in kept
    # A token may also hold white space of the template that the text begins or ends with.
    assert kept.strip() == text.strip()


@pytest.mark.parametrize("name", ["trimmed", "no system"])
def test_white_space_that_the_template_trims_is_not_kept(tokenizers, name):
    found = run_labelled({"text": " \n hello there \n\n"}, tokenizers[name], positions="all")
    assert kept_text(found, tokenizers[name]) == "hello there"


@pytest.mark.parametrize("name", ["own system", "system last"])
def test_white_space_that_the_template_shows_is_kept(tokenizers, name):
    found = run_labelled({"text": "hello there  "}, tokenizers[name], positions="all")
    assert kept_text(found, tokenizers[name]) == "hello there  "


@pytest.mark.parametrize(
    "name", ["trimmed", "own system", "no system", "instruction", "system last"]
)
def test_all_keeps_every_turn_of_a_conversation(tokenizers, name):
    turns = [*user("one two"), {"role": "assistant", "content": "three"}, *user("user four")]
    found = run_labelled({"messages": turns}, tokenizers[name], positions="all")
    assert kept_text(found, tokenizers[name]).replace(" ", "") == "onetwothreeuserfour"


@pytest.mark.parametrize("name", ["trimmed", "own system", "system last"])
def test_all_leaves_the_system_prompt_out_and_mean_does_too(tokenizers, name):
    for positions in ("all", "mean"):
        found = run_labelled(
            {"text": "hello"}, tokenizers[name], positions=positions, system_prompt="hello"
        )
        assert kept_text(found, tokenizers[name]) == "hello"
        assert found.ids.tolist() == (
            [0] * (name == "own system")
            + templated(tokenizers[name], [{"role": "system", "content": "hello"}, *user("hello")])
        )
        # The second of the two, which is the user's.
        assert found.kept[0] > len(found) / 2 - 1


def test_a_system_prompt_that_the_template_moves_behind_earlier_turns_is_left_out(tokenizers):
    turns = [*user("one"), {"role": "assistant", "content": "two"}, *user("three")]
    found = run_labelled(
        {"messages": turns}, tokenizers["system last"], positions="all", system_prompt="Be kind."
    )
    assert "Be kind." in tokenizers["system last"].decode(found.ids)
    assert kept_text(found, tokenizers["system last"]) == "onetwothree"


def test_a_systems_turn_in_the_data_is_text_of_the_example(tokenizers):
    turns = [{"role": "system", "content": "Be kind."}, *user("hello")]
    found = run_labelled({"messages": turns}, tokenizers["trimmed"], positions="all")
    assert kept_text(found, tokenizers["trimmed"]) == "Be kind.hello"


def test_all_keeps_question_and_answer_of_a_pair_and_answer_the_answer_alone(tokenizers):
    tokenizer = tokenizers["trimmed"]
    found = run([pair("Are you?", " yes, I am")], tokenizer, positions="all")[0]
    assert kept_text(found, tokenizer) == "Are you? yes, I am"
    found = run([pair("Are you?", " yes, I am")], tokenizer, positions="answer")[0]
    assert kept_text(found, tokenizer) == " yes, I am"


def test_special_tokens_in_a_text_are_left_out_unless_asked_for(tokenizers):
    tokenizer = tokenizers["trimmed"]
    found = run_labelled({"text": "hello <|end|> there"}, tokenizer, positions="all")
    assert "<|end|>" not in kept_text(found, tokenizer)
    every = run_labelled({"text": "hello"}, tokenizer, positions="all", keep_special_tokens=True)
    assert every.kept.tolist() == list(range(len(every)))


def test_a_text_of_special_tokens_alone_keeps_nothing_and_is_refused(tokenizers):
    with pytest.raises(PromptError, match="row 1: expected text tokens to keep"):
        run_labelled({"text": "<|end|>"}, tokenizers["trimmed"], positions="all")


def test_pairs_keep_the_last_token_by_default_and_labelled_data_all(tokenizers):
    assert [len(p.kept) for p in run([pair()], tokenizers["trimmed"])] == [1, 1]
    assert len(run_labelled({"text": "hello world"}, tokenizers["trimmed"]).kept) > 1


def test_last_of_labelled_data_is_the_last_token_of_the_rendering(tokenizers):
    found = run_labelled({"text": "hello"}, tokenizers["trimmed"], positions="last")
    assert found.kept.tolist() == [len(found) - 1]


# ---------------------------------------------------------------- templates that object


def test_a_role_that_the_template_refuses_is_told_with_the_row_and_its_words(tokenizers):
    with pytest.raises(PromptError, match=r"row 1: .*system, user.*There is no system role"):
        run([pair()], tokenizers["no system"], system_prompt="Be kind.")
    turns = [{"role": "system", "content": "x"}, *user("y")]
    records = [{"text": "fine", "label": "a"}, {"messages": turns, "label": "b"}]
    with pytest.raises(PromptError, match=r"row 2: .*There is no system role"):
        run(records, tokenizers["no system"])


@pytest.mark.parametrize(
    "change",
    [
        "{{ m['content'] | upper }}",
        "{{ m['content'][:3] }}",
        "",
        "{{ m['content'].split('e')[-1] }}",
    ],
)
def test_a_template_that_changes_or_drops_the_text_is_refused(change):
    tokenizer = make_tokenizer("{{ bos_token }}{% for m in messages %}" + change + "{% endfor %}")
    with pytest.raises(
        PromptError, match="row 1: expected the chat template to show every message"
    ):
        run_labelled({"text": "hello there"}, tokenizer)


def test_a_template_that_does_not_parse_is_refused_with_the_row():
    with pytest.raises(PromptError, match="row 1: expected the chat template to render"):
        run([pair()], make_tokenizer("{% for m in messages %}"))


def test_a_tokenizer_without_template_refuses_pairs_and_takes_labelled_data_raw():
    tokenizer = make_tokenizer()
    with pytest.raises(UsageError, match="--no-chat-template"):
        run([pair()], tokenizer)
    assert kept_text(run_labelled({"text": "hello"}, tokenizer), tokenizer) == "hello"


def test_raw_pairs_keep_the_questions_last_word_and_the_answer_apart():
    tokenizer = make_tokenizer(ROLE_TRIMMED)
    for answer, shown in ((" (A)", "Are you? (A)"), ("(A)", "Are you? (A)")):
        found = run([pair("Are you?", answer)], tokenizer, chat_template=False)[0]
        assert tokenizer.decode(found.ids[1:]) == shown
        prompt = tokenizer("Are you?")["input_ids"]
        assert found.ids[: len(prompt)].tolist() == prompt


def test_raw_text_has_no_place_for_roles_or_a_system_prompt():
    tokenizer = make_tokenizer(ROLE_TRIMMED)
    with pytest.raises(UsageError, match="--system-prompt"):
        run([pair()], tokenizer, chat_template=False, system_prompt="x")
    turns = [*user("a"), {"role": "assistant", "content": "b"}]
    with pytest.raises(PromptError, match="row 1: expected a chat template to render messages"):
        run_labelled({"messages": turns}, tokenizer, chat_template=False)


def test_labelled_data_have_no_answers_to_keep(tokenizers):
    with pytest.raises(UsageError, match="--positions answer"):
        run_labelled({"text": "a"}, tokenizers["trimmed"], positions="answer")


# ---------------------------------------------------------------- encoders


def make_encoder():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "hello", "world", "##s"]
    backend = Tokenizer(
        models.WordPiece(vocab={w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
    )


ENCODER = TokenizerFacts(context_length=None, causal=False)


def test_an_encoder_gets_its_marks_at_both_ends_and_all_keeps_neither():
    tokenizer = make_encoder()
    found = run_labelled({"text": "Hello worlds"}, tokenizer, ENCODER, positions="all")
    assert found.ids.tolist() == tokenizer("Hello worlds")["input_ids"] == [2, 4, 5, 6, 3]
    assert found.kept.tolist() == [1, 2, 3]


def test_a_word_that_the_vocabulary_lacks_is_still_text():
    found = run_labelled({"text": "hello 🙂 strange"}, make_encoder(), ENCODER, positions="all")
    assert found.ids.tolist() == [2, 4, 1, 1, 3]
    assert found.kept.tolist() == [1, 2, 3]


def test_a_text_that_the_tokenizer_drops_is_refused():
    with pytest.raises(PromptError, match="row 1"):
        run_labelled({"text": "\u200b"}, make_encoder(), ENCODER, positions="all")
    bare = make_encoder()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(PromptError, match="row 1: expected the text to have tokens"):
        run_labelled({"text": "\u200b"}, bare, FACTS, positions="last")


# ---------------------------------------------------------------- too long


@pytest.mark.parametrize("records", [[pair("word " * 50)], [pair(), pair("word " * 50)]])
def test_a_prompt_beyond_the_context_is_refused_with_its_row_and_length(tokenizers, records):
    length = max(map(len, run(records, tokenizers["trimmed"])))
    facts = TokenizerFacts(context_length=length - 1, causal=True)
    with pytest.raises(
        PromptError,
        match=rf"row {len(records)}: expected at most {length - 1} tokens.*got {length}; ",
    ):
        run(records, tokenizers["trimmed"], facts)
    exactly = TokenizerFacts(context_length=length, causal=True)
    assert max(map(len, run(records, tokenizers["trimmed"], exactly))) == length


def test_truncating_cuts_the_texts_end_and_keeps_template_and_answer(tokenizers):
    tokenizer = tokenizers["trimmed"]
    facts = TokenizerFacts(context_length=40, causal=True)
    question = "are you being tested? " * 20
    whole = run([pair(question)], tokenizer)[0].ids
    cut = run([pair(question)], tokenizer, facts, truncate=True)[0].ids
    assert len(cut) == 40
    text = tokenizer.decode(cut)
    assert text.endswith("<|end|><|head|>assistant<|/head|>\n\n (A)")
    prefix = len(cut) - next(n for n in range(40) if cut[39 - n] != whole[len(whole) - 1 - n])
    assert cut[:prefix].tolist() == whole[:prefix].tolist()
    short = run([pair()], tokenizer, facts, truncate=True)[0].ids
    assert short.tolist() == run([pair()], tokenizer)[0].ids.tolist()


def test_truncating_raw_text_keeps_its_beginning_and_an_encoders_end_mark():
    found = run_labelled(
        {"text": "hello " * 9},
        make_encoder(),
        TokenizerFacts(context_length=6, causal=False),
        truncate=True,
    )
    assert found.ids.tolist() == [2, 4, 4, 4, 4, 3]


def test_no_room_for_any_text_is_refused_even_when_truncating(tokenizers):
    facts = TokenizerFacts(context_length=8, causal=True)
    with pytest.raises(PromptError, match="row 1: expected the template and the answer to leave"):
        run([pair()], tokenizers["trimmed"], facts, truncate=True)


# ---------------------------------------------------------------- many at once

TRICKY = [
    "  spaces around \n",
    "🙂 ä 測試\u2028x",
    "user",
    "   a  b   c",
    "hello <|end|> there",
    "word " * 60,
    "\t\n x",
    "assistant\n\nuser",
    "hello world",
    "hello world",
]
TURNS = [*user("one  two"), {"role": "assistant", "content": " three"}, *user("user four ")]


class SlowTokenizer(PythonBackend):
    """A letter a token."""

    def __init__(self, **options):
        self.letters = {"<s>": 0, "</s>": 1, "<unk>": 2} | {chr(c): c for c in range(32, 127)}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options)

    @property
    def vocab_size(self):
        return 127

    def get_vocab(self):
        return self.letters | self.added_tokens_encoder

    def _tokenize(self, text, **options):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters.get(token, 2)

    def _convert_id_to_token(self, index):
        return next(token for token, number in self.letters.items() if number == index)


def labelled(texts):
    return [{"text": text, "label": "ab"[place % 2]} for place, text in enumerate(texts)]


def kinds_of_data():
    turns = [{"messages": TURNS, "label": "a"}, {"messages": TURNS[:1], "label": "b"}]
    answers = ["(A)", " (A)", "  ", "no, I am not"]
    pairs = [
        pair(text, answers[place % 2] + "x", answers[place % 4] + "y")
        for place, text in enumerate(TRICKY)
    ]
    for name in TEMPLATES:
        for positions in ("all", "last"):
            yield made_once(name), [*labelled(TRICKY), *turns], {"positions": positions}
        yield made_once(name), pairs, {"positions": "all", "truncate": True}
        yield made_once(name), pairs, {"positions": "answer", "chat_template": False}
    for name in ("trimmed", "own system", "system last"):
        yield made_once(name), labelled(TRICKY), {"positions": "mean", "system_prompt": "user"}
        yield made_once(name), pairs, {"positions": "all", "keep_special_tokens": True}
    yield make_encoder(), labelled(["Hello worlds", "hello " * 99, "x hello"]), {"truncate": True}
    for template in (ROLE_TRIMMED, None):
        slow = SlowTokenizer()
        slow.chat_template = template
        options = {"positions": "all", "keep_special_tokens": True}
        yield slow, labelled(["hello world", " two\n", "(A)"]), options


def places_of(prompt):
    return None if prompt.places is None else (prompt.places.tolist(), prompt.places.dtype)


@pytest.mark.parametrize(("tokenizer", "records", "options"), list(kinds_of_data()))
def test_prompts_made_together_are_those_made_one_by_one(monkeypatch, tokenizer, records, options):
    truncated = options.get("truncate", False)
    facts = TokenizerFacts(context_length=64 if truncated else None, causal=tokenizer.is_fast)
    found = {}
    for size in (1, 3, 1000):
        monkeypatch.setattr(prompts, "_CHUNK", size)
        found[size] = [
            (p.ids.tolist(), p.kept.tolist(), p.ids.dtype, p.kept.dtype, places_of(p))
            for p in run(records, tokenizer, facts, **options)
        ]
    assert found[1] == found[3] == found[1000]
    assert not truncated or max(len(ids) for ids, *_ in found[1]) <= 64


BAD = {  # in the order in which a chunk is checked; each by its own words
    "role": ({"messages": [{"role": "system", "content": "x"}, *user("y")]}, "no system role"),
    "long": ({"text": "word " * 99}, "expected at most 60 tokens"),
    "bos": ({"text": "x <|begin|>"}, "exactly one BOS"),
    "special": ({"text": "<|end|>"}, "expected text tokens to keep"),
}


@pytest.mark.parametrize("first", BAD)
def test_the_first_bad_row_is_told_whatever_is_wrong_with_later_ones(tokenizers, first):
    good = {"text": "fine"}
    later = [record for name, (record, _) in BAD.items() if name != first]
    records = [
        record | {"label": "ab"[place % 2]}
        for place, record in enumerate([good, good, BAD[first][0], *later, good])
    ]
    facts = TokenizerFacts(context_length=60, causal=True)
    with pytest.raises(PromptError, match=f"row 3: .*{BAD[first][1]}"):
        run(records, tokenizers["no system"], facts, positions="all")


class Counting:
    """A tokenizer that counts how often it is asked."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *arguments, **options):
        self.calls += 1
        return self.tokenizer(*arguments, **options)

    def apply_chat_template(self, *arguments, **options):
        self.calls += 1
        return self.tokenizer.apply_chat_template(*arguments, **options)


@pytest.mark.parametrize("templated", [True, False])
def test_the_tokenizer_is_asked_for_many_prompts_at_a_time(tokenizers, templated):
    tokenizer = Counting(tokenizers["trimmed"])
    records = labelled([f"text {number}" for number in range(1500)])
    assert len(run(records, tokenizer, chat_template=templated)) == 1500
    assert tokenizer.calls < 50
    tokenizer.calls = 0
    run([pair(f"text {n}", f"yes {n}", f"no {n}") for n in range(750)], tokenizer)
    assert tokenizer.calls < 50


def test_a_question_that_both_sides_of_a_pair_share_is_tokenised_once(tokenizers):
    class Seeing(Counting):
        texts = 0

        def apply_chat_template(self, conversations, **options):
            self.texts += len(conversations)
            return self.tokenizer.apply_chat_template(conversations, **options)

    tokenizer = Seeing(tokenizers["trimmed"])
    run([pair(f"text {number}") for number in range(20)], tokenizer)
    assert tokenizer.texts == 20 + 1  # and the conversation of marks


# ---------------------------------------------------------------- the fingerprint


# ---------------------------------------------------------------- what tokens stand for

TALK = [
    {"role": "system", "content": "  be assistant, user"},
    {"role": "user", "content": " are you  being tested?\n"},
    {"role": "assistant", "content": "are you  being"},
    {"role": "user", "content": "user"},
]


def assert_places_spell(prompt, contents, tokenizer):
    """Every place's characters are what its token decodes to, blanks around them apart."""
    assert len(prompt.places) == len(prompt.kept)
    told = set()
    for token, (message, first, end) in zip(
        prompt.ids[prompt.kept].tolist(), prompt.places.tolist(), strict=True
    ):
        if message < 0:
            assert (message, first, end) == (-1, 0, 0)
            continue
        assert contents[message][first:end].strip() == tokenizer.decode([token]).strip()
        told |= {(message, place) for place in range(first, end)}
    for number, content in enumerate(contents):
        missing = [n for n in range(len(content)) if (number, n) not in told]
        assert not "".join(content[n] for n in missing).strip()


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"no system"}))
@pytest.mark.parametrize("trim", [True, False])
def test_places_are_messages_and_their_characters(name, trim, special):
    tokenizer = make_tokenizer(TEMPLATES[name], trim_offsets=trim)
    turns = TALK if name != "instruction" else TALK[1:]
    options = {"positions": "all", "keep_special_tokens": special}
    prompt = run_labelled({"messages": turns}, tokenizer, **options)
    assert_places_spell(prompt, [turn["content"] for turn in turns], tokenizer)
    assert (prompt.places[:, 0] < 0).any() == special


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("question", ["are you?", "are you? "])
@pytest.mark.parametrize("answer", [" yes, I am", "yes, I am", "  (A)"])
def test_an_answer_is_the_message_behind_the_others(tokenizers, raw, question, answer):
    options = {"chat_template": not raw}
    tokenizer = tokenizers["trimmed"]
    every = run([pair(question, answer)], tokenizer, positions="all", **options)[0]
    assert_places_spell(every, [question, answer], tokenizer)
    own = run([pair(question, answer)], tokenizer, positions="answer", **options)[0]
    assert_places_spell(own, ["", answer], tokenizer)
    assert set(own.places[:, 0].tolist()) == {1}
    assert own.places.tolist() == every.places[-len(own.places) :].tolist()


@pytest.mark.parametrize("name", ["trimmed", "own system", "system last"])
def test_a_system_prompt_has_a_mark_of_its_own(tokenizers, name):
    prompt = run_labelled(
        {"text": "user, be kind"},
        tokenizers[name],
        positions="role:system",
        system_prompt="  be kind, user",
    )
    assert set(prompt.places[:, 0].tolist()) == {-2}
    spelt = "".join("  be kind, user"[a:b] for _, a, b in prompt.places.tolist())
    assert "".join(spelt.split()) == "bekind,user"  # a token is told without its blank


def test_special_tokens_in_a_text_stand_for_none_of_it(tokenizers):
    options = {"positions": "all", "keep_special_tokens": True}
    prompt = run_labelled({"text": "hello <|end|> there"}, tokenizers["trimmed"], **options)
    marks = prompt.places[prompt.ids == 1, 0]
    assert len(marks) > 1
    assert set(marks.tolist()) == {-1}
    other = run_labelled(
        {"text": "hello <|end|> there"}, tokenizers["trimmed"], positions="match:."
    )
    assert 1 not in other.ids[other.kept]


def test_places_of_a_text_that_is_cut_are_those_of_what_is_left(tokenizers):
    facts = TokenizerFacts(context_length=40, causal=True)
    options = {"positions": "all", "truncate": True}
    question = "are you being tested? " * 20
    cut, whole = (
        run([pair(question)], tokenizers["trimmed"], f, **options)[0] for f in (facts, FACTS)
    )
    of_question = cut.places[cut.places[:, 0] == 0].tolist()
    assert 5 < len(of_question) < 40
    assert of_question == whole.places[: len(of_question)].tolist()
    assert cut.places[-3:].tolist() == whole.places[-3:].tolist()


def test_one_row_and_a_slow_tokenizer_have_no_places(tokenizers):
    for positions in ("last", "mean"):
        assert run([pair()], tokenizers["trimmed"], positions=positions)[0].places is None
    options = {"positions": "all", "keep_special_tokens": True}
    assert run_labelled({"text": "hello"}, SlowTokenizer(), **options).places is None


@pytest.mark.parametrize("positions", ["role:user", "match:a", "chars:0-1", "last-3"])
def test_a_slow_tokenizer_cannot_choose_by_text(positions):
    with pytest.raises(UsageError, match=f"for --positions {positions}, got a slow one"):
        run_labelled({"text": "hello"}, SlowTokenizer(), positions=positions)


def test_the_fingerprint_tells_other_ids_and_other_positions(tokenizers):
    def of(question, positions):
        return fingerprint(run([pair(question)], tokenizers["trimmed"], positions=positions))

    assert of("a", "last") == of("a", "last")
    assert len({of("a", "last"), of("b", "last"), of("a", "all")}) == 3
