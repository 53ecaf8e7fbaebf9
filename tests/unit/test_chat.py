"""Conversations: reading, chat templates, what is learned of them, rows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import ByteLevel
from transformers import AutoTokenizer

from swarmtune.errors import UsageError
from swarmtune.train.chat import ChatForm
from swarmtune.train.chat_template import ChatTemplate, TemplateChoice, learned_tokens
from swarmtune.train.data import TextDataModule
from swarmtune.train.documents import Document
from swarmtune.train.python_library import python_questions
from swarmtune.train.rows import ChatRows, conversation, messages_of
from swarmtune.train.sources import DatasetSource
from swarmtune.train.windows import IGNORED_LABEL

POCKET = str(Path(__file__).parents[2] / "swarmtune" / "assets" / "pocket_bloom")
TOKENIZER = AutoTokenizer.from_pretrained(POCKET)
TRIMMING = AutoTokenizer.from_pretrained(POCKET)
"""The same, but it leaves leading spaces out of its offsets, as GPT-2's does."""
TRIMMING.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
PLAIN = TemplateChoice().of(TOKENIZER)
UNMARKED = ChatTemplate(PLAIN.text.replace("{%- generation %}", "").replace("{%- endgeneration %}", ""), "a test's")
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{% endgeneration %};"
    "{% else %}U:{{ m.content }};{% endif %}{% endfor %}"
)
SPECIAL = {"eos_token": "</s>"}


def chat(*turns: str) -> list[dict[str, str]]:
    """Turns of user and assistant."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]


def read(path: Path, **columns: str) -> list[list[dict[str, Any]]]:
    return [messages_of(item) for item in DatasetSource(str(path), ChatRows(**columns)).documents()]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- reading -----------------------------------------------------------------------------------------------------------------


def test_messages_and_prompts_with_completions_are_the_same_conversations(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    want = [chat("Hi?", "Yes."), chat("a", "b", "c", "d")]
    lines = write(tmp_path / "a.jsonl", *({"messages": item} for item in want))
    assert read(lines) == want
    datasets.Dataset.from_list([{"messages": item} for item in want]).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == want
    datasets.Dataset.from_list([{"messages": item} for item in want]).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == want
    other = [[{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in item] for item in want]
    assert read(write(tmp_path / "b.jsonl", *({"talk": item} for item in other)), messages="talk", role="from", content="value") == want
    pairs = write(tmp_path / "c.jsonl", {"q": "Hi?", "a": "Yes."}, {"q": chat("a", "b", "c"), "a": [chat("", "d")[1]]})
    assert read(pairs, prompt="q", completion="a") == want
    (tmp_path / "f.csv").write_text('messages\n"' + json.dumps(want[1]).replace('"', '""') + '"\n')
    assert read(tmp_path / "f.csv") == want[1:]


def test_conversations_that_begin_alike_share_a_group() -> None:
    one, two, other = (conversation(chat(*turns)).group for turns in (("a", "b"), ("a", "c", "d", "e"), ("x", "b")))
    assert one == two != other


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": "hello"}, "column 'messages' holds text, not a list of messages"),
        ({"messages": [{"speaker": "user", "content": "x"}]}, "a message needs the text field 'role'; it has: speaker, content (set data.role_field"),
        ({"messages": [{"role": "user", "content": [1]}]}, "the field 'content' of a message holds list, not text"),
        ({"messages": [{"role": "user", "text": None}]}, "a message has no field 'content'; it has: role, text"),
        ({"messages": ["x"]}, "a message needs the text field 'role', but is str"),
        ({"messages": 3}, "column 'messages' holds int, not a list of messages"),
        ({"talk": chat("a", "b")}, "there is no column 'messages'; there are: talk (set data.messages_column)"),
    ],
)
def test_a_row_that_is_no_conversation_is_one_sentence(row: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(write(tmp_path / "a.jsonl", row))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_conversation_without_an_answer_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": chat("a")}, {"messages": chat("a", "b")}, {"messages": None})
    found = list(DatasetSource(str(path), ChatRows()).documents(warn=True))
    assert len(found) == 1
    assert "2 of 3 rows of" in caplog.text
    assert "have no conversation in column messages: left out" in caplog.text


def test_questions_come_from_the_library_alone_and_name_their_module() -> None:
    found = python_questions()
    assert len(found) > 500
    assert found == python_questions()
    asked = {messages_of(item)[0]["content"]: messages_of(item)[1]["content"] for item in found}
    assert asked["What does textwrap.dedent do?"].startswith("Remove any common leading whitespace from every line")
    assert {item.group for item in found if "textwrap." in item.text[:80]} == {"textwrap"}


# --- what is learned ---------------------------------------------------------------------------------------------------------


def encode(template: ChatTemplate, messages: list[dict[str, str]], tokenizer: Any = TOKENIZER, **options: Any) -> tuple[list[int], list[bool]]:
    form = ChatForm(64, TemplateChoice(text=template.text), **options)
    (found,) = form.encode([conversation(messages)], tokenizer)
    return list(found.tokens), list(found.learned)


def learned_texts(template: ChatTemplate, messages: list[dict[str, str]], tokenizer: Any = TOKENIZER) -> list[str]:
    """The text of each run of learned tokens."""
    tokens, learned = encode(template, messages, tokenizer)
    runs: list[list[int]] = []
    for place, (token, is_learned) in enumerate(zip(tokens, learned, strict=True)):
        if is_learned and (place == 0 or not learned[place - 1]):
            runs.append([])
        if is_learned:
            runs[-1].append(token)
    return [TOKENIZER.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def test_the_plain_template_teaches_answers_and_their_end() -> None:
    messages = [{"role": "system", "content": "Be kind."}, *chat("Hi?", "Hello.\n  x = 1", "And?", "Bye. ")]
    text, spans = PLAIN.assistant_spans(messages, SPECIAL)
    assert text == "<|system|>\nBe kind.\n<|user|>\nHi?\n<|assistant|>\nHello.\n  x = 1</s>\n<|user|>\nAnd?\n<|assistant|>\nBye. </s>\n"
    assert [text[begin:end] for begin, end in spans] == ["Hello.\n  x = 1</s>", "Bye. </s>"]
    assert PLAIN.render(messages[:2], {}, prompt=True)[0].endswith("Hi?\n<|assistant|>\n")
    assert learned_texts(PLAIN, messages) == ["Hello.\n  x = 1</s>", "Bye. </s>"]


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<", exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_whatever_is_said_the_learned_tokens_are_the_answers(pairs: list[tuple[str, str]]) -> None:
    messages = chat(*(text for pair in pairs for text in pair))
    for template, end in ((PLAIN, "</s>"), (UNMARKED, "</s>\n")):
        for tokenizer in (TOKENIZER, TRIMMING):
            found = learned_texts(template, messages, tokenizer)
            assert len(found) == len(pairs)
            for run, (_, answer) in zip(found, pairs, strict=True):
                assert run.endswith(answer + end)
                assert run.removesuffix(answer + end).strip() == "", "a token may reach over the space before an answer, no further"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.data())
def test_a_token_is_learned_if_it_holds_a_character_of_a_span(sizes: list[int], data: st.DataObject) -> None:
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    cuts = sorted(data.draw(st.sets(st.integers(0, ends[-1]), max_size=6)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    inside = {character for begin, end in spans for character in range(begin, end)}
    offsets = [(end - data.draw(st.integers(0, size)), end) for end, size in zip(ends, sizes, strict=True)]  # leading spaces may be left out
    expected = [any(character in inside for character in range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    assert learned_tokens(offsets, spans) == expected


def test_a_space_at_the_end_of_an_answer_does_not_teach_what_follows() -> None:
    """Where the library's own mask would: no token holds that space, so it takes everything up to the end."""
    messages = chat("a", "b ", "a question that is not learned", "c")
    template = ChatTemplate(MARKED, "a test's")
    for tokenizer, theirs_is_right in ((TOKENIZER, True), (TRIMMING, False)):
        theirs = tokenizer.apply_chat_template(messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True)
        tokens, learned = encode(template, messages, tokenizer)
        assert theirs["input_ids"] == tokens
        assert (theirs["assistant_masks"] == [int(item) for item in learned]) == theirs_is_right
        assert learned_texts(template, messages, tokenizer) == ["b ", "c"]


def test_a_template_without_marks_whose_turns_change_earlier_ones_is_refused() -> None:
    forgetful = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.role }}:{{ m.content }};{% else %}[gone]{% endif %}{% endfor %}"
    encode(ChatTemplate(forgetful, ""), chat("a", "b"))
    with pytest.raises(UsageError, match=r"has no {% generation %} marks, and a later turn changes the text of an earlier one") as caught:
        encode(ChatTemplate(forgetful, ""), chat("a", "b", "c", "d"))
    assert "\n" not in str(caught.value)
    tokens, learned = encode(ChatTemplate(forgetful, ""), chat("a", "b", "c", "d"), everything=True)
    assert all(learned)
    assert len(learned) == len(tokens)


@pytest.mark.parametrize("text", ["{% for m in %}", "{{ raise_exception('roles must alternate') }}", "{{ messages[9].content }}", "{{ 1 + 'a' }}"])
def test_a_template_that_fails_is_one_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"^the chat template \(data.chat_template\) fails on the conversation that begins with 'Hi\?': ") as caught:
        encode(ChatTemplate(text, ""), chat("Hi?", "Yes."))
    assert "\n" not in str(caught.value)


def test_the_template_is_the_given_one_then_the_tokenizers_then_the_plain_one(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text("from a file")
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    assert TemplateChoice().of(tokenizer) == PLAIN
    tokenizer.chat_template = "its own"
    assert TemplateChoice().of(tokenizer).text == "its own"
    assert TemplateChoice(file=str(tmp_path / "a.jinja")).of(tokenizer).text == "from a file"
    assert TemplateChoice(text="given").of(tokenizer).text == "given"
    tokenizer.chat_template = {"a": "x", "b": "y"}
    with pytest.raises(UsageError, match="several chat templates"):
        TemplateChoice().of(tokenizer)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        TemplateChoice(file="/no/such").of(tokenizer)


# --- rows --------------------------------------------------------------------------------------------------------------------

TALKS = [chat(f"Question {index}?" * (index % 3 + 1), f"Answer {index}." * (index % 5 + 1), "Really?", "Yes.") for index in range(24)]


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    return write(tmp_path / "talks.jsonl", *({"messages": item} for item in TALKS))


def module(path: Path, **options: Any) -> TextDataModule:
    keys = {"source": "dataset", "format": "chat", "path": str(path), "sequence_length": 96, "batch_size": 4, "cache": False}
    return TextDataModule(POCKET, **{**keys, **options})


def batches(data: TextDataModule, side: str) -> list[dict[str, torch.Tensor]]:
    rows = data.windows[side]
    return [rows.batch([index]) for index in range(len(rows))]


def alone(data: TextDataModule, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Tokens and labels of one conversation."""
    (found,) = data.form.encode([conversation(messages)], TOKENIZER)
    labels = [token if learned else IGNORED_LABEL for token, learned in zip(found.tokens, found.learned, strict=True)]
    return list(found.tokens), [IGNORED_LABEL, *labels[1:]]


def test_padded_rows_hold_each_conversation_once_and_teach_its_answers(talks: Path) -> None:
    data = module(talks)
    found = [batch for side in ("train", "val") for batch in batches(data, side)]
    assert sorted(batch["input_ids"][0].tolist() for batch in found) == sorted(alone(data, item)[0] for item in TALKS)
    both = data.windows["train"].batch([0, 1, 2])
    for row, mask, labels in zip(both["input_ids"], both["attention_mask"], both["labels"], strict=True):
        size = int(mask.sum())
        assert mask.tolist() == [1] * size + [0] * (len(mask) - size)
        assert row[size:].tolist() == [0] * (len(mask) - size)
        own = next(item for item in TALKS if alone(data, item)[0] == row[:size].tolist())
        assert labels.tolist() == alone(data, own)[1] + [IGNORED_LABEL] * (len(mask) - size)
    assert len(data.windows["val"]) == int(len(TALKS) * 0.15) or 0 < len(data.windows["val"]) < 8


def test_packed_rows_hold_the_same_conversations_apart(talks: Path) -> None:
    data, padded = module(talks, packing="always", sequence_length=160), module(talks, sequence_length=160)
    rows = batches(data, "train")
    assert len(rows) < len(padded.windows["train"])
    found = []
    for batch in rows:
        assert batch.keys() == {"input_ids", "position_ids", "labels"}
        ids, positions, labels = (batch[name][0].tolist() for name in ("input_ids", "position_ids", "labels"))
        assert len(ids) == 160
        begins = [place for place, position in enumerate(positions) if position == 0 and positions[place + 1 : place + 2] == [1]]
        for begin, next_begin in zip(begins, [*begins[1:], 160], strict=True):
            size = next(size for size in range(next_begin - begin, 0, -1) if positions[begin + size - 1] == size - 1)
            assert positions[begin : begin + size] == list(range(size))
            assert labels[begin] == IGNORED_LABEL
            assert labels[begin + size : next_begin] == [IGNORED_LABEL] * (next_begin - begin - size)
            found.append((ids[begin : begin + size], labels[begin : begin + size]))
    assert sorted(found) == sorted(alone(data, item) for item in TALKS if alone(data, item)[0] in [ids for ids, _ in found])
    assert len(found) == len(padded.windows["train"])


@pytest.mark.parametrize("packing", ["always", "never"])
def test_what_is_too_long_is_cut_or_left_out_and_said(talks: Path, packing: str, caplog: pytest.LogCaptureFixture) -> None:
    sizes = [len(alone(module(talks), item)[0]) for item in TALKS]
    limit = sorted(sizes)[12]
    cut = module(talks, sequence_length=limit, packing=packing)
    whole = sum(len(cut.windows[side].batch(range(len(cut.windows[side])))["input_ids"]) for side in ("train", "val"))
    assert f"are longer than data.sequence_length={limit}: their ends are cut off" in caplog.text
    assert whole == len(TALKS) or packing == "always"
    caplog.clear()
    dropped = module(talks, sequence_length=limit, packing=packing, too_long="drop")
    dropped.setup()
    counts = [int(record.args[0]) for record in caplog.records if "left out" in str(record.msg % record.args)]  # type: ignore[index, arg-type]
    assert sum(counts) == sum(size > limit for size in sizes)
    if packing == "never":
        assert len(dropped.windows["train"]) + len(dropped.windows["val"]) == sum(size <= limit for size in sizes)


def test_a_conversation_whose_answer_is_cut_off_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", *({"messages": chat(f"{index} " * 90, "No.")} for index in range(3)), *({"messages": item} for item in TALKS))
    data = module(path)
    data.setup()
    assert "without a token to learn in the first 96: left out" in caplog.text
    assert len(data.windows["train"]) + len(data.windows["val"]) == len(TALKS)
    nothing = write(tmp_path / "b.jsonl", *({"messages": chat(f"{index} " * 90, "No.")} for index in range(3)))
    with pytest.raises(UsageError, match="the data holds too little text"):
        module(nothing).setup()


def test_everything_is_learned_on_request(talks: Path) -> None:
    some, everything = module(talks), module(talks, train_on="everything")
    one, other = some.windows["train"].batch([0])["labels"], everything.windows["train"].batch([0])["labels"]
    assert (other != IGNORED_LABEL).sum() == other.numel() - 1
    assert (one != IGNORED_LABEL).sum() < other.numel() - 1


def test_tokens_are_kept_for_every_length_and_packing_but_not_for_another_template(talks: Path, tmp_path: Path, monkeypatch: Any) -> None:
    made = []
    original = ChatForm.encode

    def encode(self: ChatForm, documents: list[Document], tokenizer: Any) -> Any:
        made.append(len(documents))
        return original(self, documents, tokenizer)

    monkeypatch.setattr(ChatForm, "encode", encode)
    keep = {"cache": True, "cache_dir": str(tmp_path / "cache")}
    first = module(talks, **keep)
    rows = batches(first, "train")
    assert made
    made.clear()
    again = module(talks, **keep)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(rows, batches(again, "train"), strict=True) for name in a)
    assert first.fingerprint() == again.fingerprint() == module(talks, seed=3, batch_size=2, **keep).fingerprint()
    others = {"packing": "always"}, {"sequence_length": 80}, {"too_long": "drop"}
    assert len({first.fingerprint(), *(module(talks, **other, **keep).fingerprint() for other in others)}) == 4
    assert not made
    template = {"chat_template": MARKED}
    assert (
        len({first.fingerprint(), module(talks, **template, **keep).fingerprint(), module(talks, train_on="everything", **keep).fingerprint()}) == 3
    )
    assert made


def test_the_template_stands_beside_the_adapter(talks: Path) -> None:
    assert module(talks).companions() == {"chat_template.jinja": PLAIN.text}
    assert module(talks, chat_template=MARKED).companions() == {"chat_template.jinja": MARKED}
    assert TextDataModule(POCKET).companions() == {}


# --- streams and resumption --------------------------------------------------------------------------------------------------


def take(data: TextDataModule, count: int, state: dict[str, int] | None = None) -> tuple[list[Any], dict[str, int]]:
    loader = data.train_dataloader()
    if state is not None:
        loader.load_state_dict(state)
    found: list[Any] = []
    while len(found) < count:
        for batch in loader:
            found.append({name: tensor.tolist() for name, tensor in batch.items()})
            if len(found) == count:
                break
    loader.close()
    return found, loader.state_dict()


@pytest.mark.parametrize("packing", ["always", "never"])
@pytest.mark.parametrize("streaming", [True, False])
def test_it_goes_on_with_the_very_next_batch(talks: Path, packing: str, streaming: bool) -> None:
    options = {
        "packing": packing,
        "batch_size": 2,
        "streaming": streaming,
        **({"shuffle_windows": 5, "validation_fraction": 0.3} if streaming else {}),
    }
    whole, _ = take(module(talks, **options), 24)
    assert len({json.dumps(batch) for batch in whole}) > 12
    for done in (1, 11):
        first, state = take(module(talks, **options), done)
        rest, _ = take(module(talks, **options), 24 - done, state)
        assert first + rest == whole
    assert whole != take(module(talks, seed=1, **options), 24)[0]


def test_a_worker_process_makes_the_same_batches_of_a_stream(talks: Path) -> None:
    options = {"packing": "always", "streaming": True, "shuffle_windows": 5, "validation_fraction": 0.3}
    assert take(module(talks, num_workers=1, **options), 6)[0] == take(module(talks, **options), 6)[0]


def test_a_stream_says_once_what_it_leaves_out(talks: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        list(
            module(talks, sequence_length=40).form.stream(
                module(talks, sequence_length=40).form.encode([conversation(item) for item in TALKS], TOKENIZER), TOKENIZER
            )
        )
    assert len(caplog.records) == len({record.getMessage().partition(" conversations")[2] for record in caplog.records}) > 0
