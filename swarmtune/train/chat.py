"""Conversations as rows: rendered by a chat template, what the assistant says to be learned, each in a row of its own or several packed into one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from swarmtune.errors import UsageError
from swarmtune.train.chat_template import ChatTemplate, TemplateChoice, learned_tokens
from swarmtune.train.documents import Document
from swarmtune.train.examples import Example, ExampleCollector, Examples, Fitter, pad
from swarmtune.train.forms import Collector, Tensors, pad_token
from swarmtune.train.packing import fill_rows, pack_rows, plan_rows
from swarmtune.train.rows import messages_of
from swarmtune.train.windows import Batch, tensor_digest


class ChatForm:
    """Conversations of at most ``length`` tokens.

    Args:
        length: T.
        choice: which template renders them.
        everything: learn all tokens, not only the assistant's.
        packed: several share a row.
        drop: leave out what is too long, instead of cutting off its end.
    """

    def __init__(self, length: int, choice: TemplateChoice, *, everything: bool = False, packed: bool = False, drop: bool = False) -> None:
        self.length, self.choice, self.everything, self.packed, self.drop = length, choice, everything, packed, drop

    def template(self, tokenizer: Any) -> ChatTemplate:
        """What renders a conversation."""
        return self.choice.of(tokenizer)

    def identity(self, tokenizer: Any) -> list[Any]:
        """The template, the tokens that it names, and what is learned."""
        return ["chat", self.template(tokenizer).text, sorted(_special(tokenizer).items()), self.everything]

    def encode(self, documents: Sequence[Document], tokenizer: Any) -> Iterable[Example]:
        """The tokens of each conversation, and whether each is learned; whole, however long.

        Raises:
            UsageError: the tokenizer cannot say where its tokens stand, or the template fails.
        """
        if not tokenizer.is_fast:
            raise UsageError("conversations need a tokenizer of the tokenizers library, which says where in the text its tokens stand")
        template, special = self.template(tokenizer), _special(tokenizer)
        if self.everything:
            rendered = [template.render(messages_of(item), special)[0] for item in documents]
            spans = [[(0, len(text))] for text in rendered]
        else:
            pairs = [template.assistant_spans(messages_of(item), special) for item in documents]
            rendered, spans = [text for text, _ in pairs], [found for _, found in pairs]
        coded = tokenizer(rendered, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False)
        for tokens, offsets, found in zip(coded["input_ids"], coded["offset_mapping"], spans, strict=True):
            yield Example(tokens, learned_tokens(offsets, found))

    def collector(self, tokenizer: Any) -> Collector:
        """Takes conversations as they are."""
        return ExampleCollector()

    def rows(self, tensors: Tensors, side: str, tokenizer: Any, limit: int | None = None) -> ChatRowsInMemory:
        """The rows, planned; what is cut off or left out is counted and said."""
        return ChatRowsInMemory(self, tensors, side, pad_token(tokenizer), limit)

    def stream(self, encoded: Iterable[Example], tokenizer: Any) -> Iterator[list[Example]]:
        """Rows of one conversation, or of as many as have room."""
        fitter = Fitter(self.length, self.drop)

        def fitting() -> Iterator[Example]:
            for example in encoded:
                fitted = fitter.fit(example)
                fitter.report("a pass of the stream so far")
                if fitted is not None:
                    yield fitted

        return fill_rows(fitting(), self.length) if self.packed else ([example] for example in fitting())

    def batch(self, rows: Sequence[list[Example]], tokenizer: Any) -> Batch:
        """Rows as a batch."""
        return self.to_batch(rows, pad_token(tokenizer))

    def to_batch(self, rows: Sequence[list[Example]], fill: int) -> Batch:
        """Rows of exactly T tokens if packed, else as long as the longest of them."""
        return pack_rows(rows, self.length, fill) if self.packed else pad((example for row in rows for example in row), fill)


class ChatRowsInMemory:
    """The rows of one side: which conversations they hold, and the tokens of all conversations."""

    def __init__(self, form: ChatForm, tensors: Tensors, side: str, fill: int, limit: int | None) -> None:
        self.form, self.fill = form, fill
        self.examples = Examples(tensors["tokens"], tensors["learned"], tensors["ends"])
        fitter, sizes = self._fitter(), {}
        for index in range(len(self.examples)):
            if (fitted := fitter.fit(self.examples[index])) is not None:
                sizes[index] = len(fitted)
        fitter.report(side)
        kept = list(sizes)
        planned = plan_rows(list(sizes.values()), form.length) if form.packed else [[place] for place in range(len(kept))]
        self.plan = [[kept[place] for place in row] for row in planned[:limit]]

    def _fitter(self) -> Fitter:
        return Fitter(self.form.length, self.form.drop)

    def __len__(self) -> int:
        return len(self.plan)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some of them as a batch."""
        fitter = self._fitter()
        rows = [[fitted for number in self.plan[index] if (fitted := fitter.fit(self.examples[number])) is not None] for index in indices]
        return self.form.to_batch(rows, self.fill)

    def identity(self) -> list[Any]:
        """Digests of all conversations, and what makes rows of them."""
        kept = (self.examples.tokens_M, self.examples.learned_M, self.examples.ends_N)
        return ["chat", *map(tensor_digest, kept), self.form.length, self.form.packed, self.form.drop, len(self.plan)]


def _special(tokenizer: Any) -> dict[str, Any]:
    """The special tokens that a template may name."""
    return {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
