"""Prompts and responses: records of a source become tokens of which only the responses are labels.

A record has `messages` (role and content), `prompt` and `completion`, or `instruction`, `input` (may be missing) and `output`.
Messages are rendered by the tokenizer's chat template, and so are instructions where it has one; otherwise an instruction is
written as Stanford Alpaca's. A prompt and its completion are text as it stands, ended by EOS.
"""

import json
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import tokenizers
from jinja2 import TemplateError

from kd_core.system.terminal import one_line
from kd_core.text.causal_tokenizer import special_tokens
from kd_core.text.documents import Fields, checked_unicode, record_text
from kd_core.text.packing import BEGINS, LABEL, CausalPacker, Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# https://github.com/tatsu-lab/stanford_alpaca: the prompts of its data release.
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
)
PAIRED = ", paired with an input that provides further context"
# Templates of Llama 3 would write today's date; this is what they write when they do not know it.
DATE = "26 Jul 2024"
OTHER = "What else could be said."


# ------------------------------------------------------------------------------------------------------------- records


def record_dialogue(record: Any, place: str) -> str:
    """A record's prompts and responses as JSON, other fields left out.

    Raises:
        ValueError: the record has none of the three forms, or something in it is no text.
    """
    given = record if isinstance(record, dict) else {}
    forms = (("messages",), ("prompt", "completion"), ("instruction", "output"))
    form = next((names for names in forms if all(given.get(name) is not None for name in names)), None)
    if form is None:
        raise ValueError(
            f'--data: {place} needs "messages", "prompt" and "completion", or "instruction" and "output"; it has only '
            f"{sorted(name for name in given if given[name] is not None)}"
        )
    if form == ("messages",):
        turns = [turn if isinstance(turn, dict) else {} for turn in given["messages"]]
        kept: Any = {"messages": [{name: turn.get(name) for name in ("role", "content")} for turn in turns]}
        texts = [text for turn in kept["messages"] for text in turn.values()]
    else:
        kept = {name: given[name] for name in (*form, "input") if given.get(name) is not None}
        texts = list(kept.values())
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"--data: {place} has something else than texts in {' and '.join(map(repr, form))}")
    return checked_unicode(json.dumps(kept, ensure_ascii=False), place)


COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output")


def dialogue_fields(pair: tuple[str, str] | None) -> Fields:
    """The known fields of a record or, by other names, an instruction and its output."""
    if pair is None:
        return Fields(COLUMNS, record_dialogue)

    def record_pair(record: Any, place: str) -> str:
        given = record if isinstance(record, dict) else {}
        texts = {name: text for name, text in given.items() if isinstance(text, str)}
        if not texts.keys() >= set(pair):
            raise ValueError(
                f"--fields {' '.join(pair)}: {place} has no text in {' and '.join(map(repr, pair))}; its texts are in "
                f"{sorted(texts)}"
            )
        return record_dialogue({"instruction": texts[pair[0]], "output": texts[pair[1]]}, place)

    return Fields(pair, record_pair)


def record_kind(record: Any, place: str) -> str:
    """ "text" or "dialogue".

    Raises:
        ValueError: neither.
    """
    present = {name for name, value in record.items() if value is not None} if isinstance(record, dict) else set()
    if "text" not in present and present & set(COLUMNS):
        record_dialogue(record, place)
        return "dialogue"
    if isinstance(record, dict) and "text" not in record:
        raise ValueError(
            f'--data: {place} needs a field "text", or those of a prompt and response: "messages", "prompt" and "completion", or '
            f'"instruction" and "output"; it has only {sorted(record)}'
        )
    record_text(record, place)
    return "text"


KIND = Fields(("text", *COLUMNS), record_kind)


def contents(dialogue: str) -> str:
    """The texts of what `record_dialogue` gives, one after the other, to train a tokenizer on."""
    record = json.loads(dialogue)
    turns = [turn["content"] for turn in record.pop("messages", [])]
    return "\n".join([*turns, *record.values()])


# ----------------------------------------------------------------------------------------------------------- rendering


class Rendered(NamedTuple):
    """A dialogue as one text.

    Attributes:
        responses: begin and end, in characters, of what the model has to write.
        chat: by a chat template, in which special tokens are written; otherwise what looks like one is text.
        ended: by what stands in the text; otherwise EOS has to be added.
    """

    text: str
    responses: list[tuple[int, int]]
    chat: bool = False
    ended: bool = False


def render(dialogue: str, tokenizer: "PreTrainedTokenizerFast") -> Rendered:
    """What `record_dialogue` gives as text: the prompts and, marked, the responses.

    Raises:
        ValueError: there is no chat template for messages, or it does not keep the assistant's turns.
    """
    record = json.loads(dialogue)
    if "instruction" in record:
        instruction, given, output = record["instruction"], record.get("input"), record["output"]
        if tokenizer.chat_template:
            asked = f"{instruction}\n\n{given}" if given else instruction
            record = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]}
        else:
            parts = [ALPACA.format(paired=PAIRED if given else ""), f"### Instruction:\n{instruction}"]
            parts += [f"### Input:\n{given}"] if given else []
            record = {"prompt": "\n\n".join([*parts, "### Response:\n"]), "completion": output}
    if "messages" in record:
        return render_chat(record["messages"], tokenizer)
    text = record["prompt"] + record["completion"]
    return Rendered(text, [(len(record["prompt"]), len(text))])


def render_chat(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerFast") -> Rendered:
    """The chat template's text of a conversation, and where in it the assistant's turns are.

    A turn is found by saying something else in its place, which must change nothing around it. It begins where the template has
    the model begin, behind the generation prompt, if that stands there (some templates drop the thoughts that it opens), and
    ends behind what the template puts after a last turn, or else behind the special token that is there.

    Raises:
        ValueError: no template, one that fails, or one that drops or rewrites a turn of the assistant.
    """
    whole = _apply(messages, tokenizer)
    responses, ended = [], True
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not number:  # a turn that comes first answers nothing
            continue
        other = {"role": "assistant", "content": OTHER}
        prompt = _apply(messages[:number], tokenizer, add_generation_prompt=True)
        before, kept, behind = _apply([*messages[:number], other, *messages[number + 1 :]], tokenizer).partition(OTHER)
        said = message["content"]
        # The turn may bring the thoughts that the template puts before others.
        ways = [(start, text) for start in (before, prompt) for text in (said, said.strip())]
        fitting = [(start, text) for start, text in ways if whole == start + text + behind]
        if not kept or not fitting:
            raise ValueError(
                f"the chat template of --tokenizer {tokenizer.name_or_path} drops or rewrites the assistant's turn "
                f"{said[:40]!r}; give a --chat-template that keeps every turn as it is"
            )
        start, text = fitting[0]
        opened = whole.startswith(prompt) and len(prompt) <= len(start)
        last = _apply([*messages[:number], other], tokenizer).partition(OTHER)[2]
        end = last if behind.startswith(last) else _special_token_of(behind, tokenizer)
        end = end.rstrip() or end
        responses.append((len(prompt) if opened else len(start), len(start + text + end)))
        ended = bool(end.strip()) or number + 1 < len(messages)
    return Rendered(whole, responses, chat=True, ended=ended)


def _special_token_of(text: str, tokenizer: "PreTrainedTokenizerFast") -> str:
    """The special token that a text begins with; empty where it begins with none."""
    return max((token for token in special_tokens(tokenizer) if text.startswith(token)), key=len, default="")


def _apply(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerFast", **options: Any) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"--tokenizer {tokenizer.name_or_path} has no chat template, which messages are rendered by; give the "
            "tokenizer of a chat model, or --chat-template FILE"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE, **options))
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(
            f"the chat template of --tokenizer {tokenizer.name_or_path} refuses a conversation of "
            f"{[message['role'] for message in messages]} ({one_line(error)}); correct the data or give --chat-template"
        ) from error


# ------------------------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True, eq=False)
class DialoguePacker(CausalPacker):
    """Rows of whole dialogues, with the tokens of their responses as labels.

    A response without its prompt is another task, so no dialogue is cut in two: each goes into the fullest row that has room,
    and what is left of a row is a document of EOS without labels. One that is longer than a row is left out or, if `cut`,
    ends with the row.

    Attributes:
        chat: the Hugging Face tokenizer, which has the chat template.
        chat_template: the template and what else its text depends on.
    """

    chat: Any = None
    chat_template: str = ""

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast", seq_len: int, **options: Any) -> Self:
        template = json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map, DATE])
        packer = super().of(tokenizer, seq_len, chat=tokenizer, chat_template=template, **options)
        packer.tokenizer.post_processor = None  # ByteLevel's would take blanks out of the places of tokens
        return packer

    def _facts(self) -> dict[str, Any]:
        return {name: value for name, value in super()._facts().items() if name != "chat"}

    @property
    def shortfall(self) -> str:
        return self._too_long

    def _rows(self, texts: list[str], rest: np.ndarray, report: Report) -> tuple[np.ndarray, np.ndarray]:
        special = special_tokens(self.chat)
        # Read as tokens, they would end turns that go on, and begin some that nobody has taken.
        forged = lambda one, text: one.chat and any(token in contents(text) for token in special)
        rendered = [render(text, self.chat) for text in texts]
        clean = [one for one, text in zip(rendered, texts, strict=True) if not forged(one, text)]
        report.count(left_out_with_special_tokens_in_their_text=len(texts) - len(clean))
        documents = list(self._dialogues(clean, report))
        if not self.packing:
            return self._padded(documents, report), rest
        rows_of = best_fit([len(tokens) for tokens in documents], self.seq_len)
        rows = np.zeros((len(rows_of), self.seq_len), self.token_dtype)
        rows["id"] = self.eos_id
        for row, numbers in zip(rows, rows_of, strict=True):
            tokens = np.concatenate([documents[number] for number in numbers])
            row[: len(tokens)] = tokens
            row["marks"][len(tokens) : len(tokens) + 1] = BEGINS
        report.count(tokens_of_filling=rows.size - sum(map(len, documents)))
        return rows, rest

    def _dialogues(self, rendered: Sequence[Rendered], report: Report) -> Iterator[np.ndarray]:
        """The tokens of each dialogue, in order, none longer than a row."""
        encoded = {
            chat: iter(self._spell([one.text for one in rendered if one.chat == chat], chat)) for chat in (True, False)
        }
        for one in rendered:
            tokens = self._tokens(next(encoded[one.chat]), one)
            if len(tokens) > self.seq_len and self.cut:
                prompt = int(np.argmax(tokens["marks"] & LABEL))
                if prompt >= self.seq_len:
                    raise ValueError(
                        f"--on-too-long cut: a prompt of {prompt} tokens ({one.text[:40]!r}) leaves nothing of a row of --seq-len "
                        f"{self.seq_len} to its response; give a larger --seq-len, or --on-too-long drop"
                    )
                report.count(cut=1)
                yield tokens[: self.seq_len]
            elif len(tokens) > self.seq_len:
                report.count(left_out_as_too_long=1)
            elif len(tokens):
                yield tokens

    def _spell(self, texts: list[str], special: bool) -> list[tokenizers.Encoding]:
        """With places; special tokens in a text are such or, unless `special`, text."""
        self.tokenizer.encode_special_tokens = not special
        encodings: list[tokenizers.Encoding] = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return encodings

    def _tokens(self, encoding: tokenizers.Encoding, rendered: Rendered) -> np.ndarray:
        """A token with characters of a prompt and of its response is a label: the response cannot be had without it."""
        begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        is_label = np.zeros(len(begins), bool)
        for start, stop in rendered.responses:
            is_label |= (begins < stop) & ((ends > start) | (begins >= start))
        ids, labels = list(encoding.ids), is_label.tolist()
        if not rendered.chat:
            ids, labels = [*self.prefix, *ids], [*(False for _ in self.prefix), *labels]
        if not rendered.ended:
            ids, labels = [*ids, self.eos_id], [*labels, True]
        tokens = np.empty(len(ids), self.token_dtype)
        tokens["id"], tokens["marks"] = ids, np.where(labels, LABEL, 0)
        tokens["marks"][:1] = BEGINS
        return tokens


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the things in each row: longest first, each into the fullest row that has room for it.

    Source: best-fit decreasing, Johnson 1973; a row left half empty is rare, and there is one at most.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what each row has left, ascending, and its number
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        at = bisect_left(room, (lengths[number], 0))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        insort(room, (left - lengths[number], row))
    return rows
