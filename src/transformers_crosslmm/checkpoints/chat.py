"""Keeps a language model's tokenizer and chat template, and adds media to them."""

import json
import re
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TokenizersBackend

from ..processing_crosslmm import CHAT_TEMPLATE, IMAGE_TOKEN, MARKS, VIDEO_TOKEN

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
HOLLOW = "\ue001"
"""Stands for an assistant's text in the run that finds its place; a private-use character."""

PROBES = ("  def f(x):\n\treturn x**2  \n\n\nEND", "I don't know 12345 caf\u0065\u0301 ½ 你好 🙂 <b>", " ")
"""Texts that tokenizers of different families split differently: runs of blanks, digits, combining characters."""

MEDIA_TEMPLATE = """\
{%- macro as_text(text, role="") -%}
    {%- set escaped = namespace(text=text) -%}
    {%- if not texts_are_escaped -%}
        {%- for mark in @MARKS@ + ([] if role == "assistant" else @WORDS@) -%}
            {%- set escaped.text = escaped.text | replace(mark, mark[0] ~ "\ue000" ~ mark[1:]) -%}
        {%- endfor -%}
    {%- endif -%}
    {{- escaped.text -}}
{%- endmacro -%}
{%- macro own(messages) -%}
{{- "" }}@OWN@{{ "" -}}
{%- endmacro -%}
{%- set chat = namespace(plain=[], hollow=[], thoughts=[], words=[]) -%}
{%- for message in messages -%}
    {%- set content = namespace(text=message.content, run="") -%}
    {%- if message.content is string -%}
        {%- set content.text = as_text(message.content, message.role) -%}
    {%- elif message.content is defined and message.content is not none -%}
        {%- set content.text = "" -%}
        {%- for part in message.content -%}
            {%- if part.type in ("video", "image") -%}
                {%- set mark = "<|vision_start|><|" ~ part.type ~ "_pad|><|vision_end|>" -%}
                {%- set content.text = content.text ~ as_text(content.run, message.role) ~ mark -%}
                {%- set content.run = "" -%}
            {%- elif part.text -%}
                {%- set content.run = content.run ~ part.text -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set content.text = content.text ~ as_text(content.run, message.role) -%}
    {%- endif -%}
    {%- set message = dict(message, role=as_text(message.role)) -%}
    {%- set message = dict(message, content=content.text) if content.text is string else message -%}
    {%- set chat.plain = chat.plain + [message] -%}
    {%- if message.role == "assistant" and content.text is string -%}
        {%- set words = content.text.split("</think>")[-1].lstrip() if "</think>" in content.text else content.text -%}
        {%- set thought = content.text[:content.text | length - words | length] -%}
        {%- set chat.thoughts = chat.thoughts + [thought] -%}
        {%- set chat.words = chat.words + [words@TRIM@] -%}
        {%- set message = dict(message, content=thought ~ "@HOLLOW@") -%}
    {%- endif -%}
    {%- set chat.hollow = chat.hollow + [message] -%}
{%- endfor -%}
{%- set whole = own(chat.plain) -%}
{%- set pieces = own(chat.hollow).split("@HOLLOW@") -%}
{%- set filled = namespace(text=pieces[0]) -%}
{%- for word in chat.words -%}
    {%- set filled.text = filled.text ~ word ~ (pieces[loop.index] or "") -%}
{%- endfor -%}
{%- if filled.text == whole and pieces | length == chat.words | length + 1 -%}
    {%- set rest = namespace(text=pieces[0]) -%}
    {%- for word in chat.words -%}
        {%- set thought = chat.thoughts[loop.index0] -%}
        {%- set thought = thought if rest.text.endswith(thought) else "" -%}
        {{- rest.text[:rest.text | length - thought | length] -}}
        {%- set end = @END@ if pieces[loop.index].startswith(@END@) else "" -%}
        {%- generation -%}{{- thought ~ word ~ end -}}{%- endgeneration -%}
        {%- set rest.text = pieces[loop.index][end | length:] -%}
    {%- endfor -%}
    {{- rest.text -}}
{%- else -%}
    {{- whole -}}
{%- endif -%}
"""
"""Wraps the template of a language model (OWN), which gets messages of text with marks in place of media. Its output
is unchanged. A second run with HOLLOW in place of the assistant's text finds that text; it and the end of its turn
(END) are marked for training, and the thought before it where the template keeps it. If a program other than the
processor renders the template, it escapes special tokens in texts (MARKS) itself, and in texts that are not the
assistant's also the words that the language model has tokens for (WORDS), such as <think>."""


def find_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Loads the folder's tokenizer; None if there is none.

    A tokenizer.json is used as it is: the class of the model's type would replace its splitting and normalisation.
    Raises ValueError if the result still tokenizes differently from the file.
    """
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return None
    file = folder / "tokenizer.json"
    if not file.is_file():
        return AutoTokenizer.from_pretrained(folder)
    tokenizer = TokenizersBackend.from_pretrained(folder)
    as_in_file = tokenizers.Tokenizer.from_file(str(file))
    for text in PROBES:
        expected = as_in_file.encode(text, add_special_tokens=False).ids
        if (found := tokenizer(text, add_special_tokens=False)["input_ids"]) != expected:
            raise ValueError(
                f"{folder} must tokenize as its tokenizer.json does; {text!r} becomes {len(found)} tokens instead of "
                f"{len(expected)}, because of tokenizer_config.json. Correct or remove that file."
            )
    return tokenizer


def add_marks(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Adds the marks of roles and media that a tokenizer lacks, as special tokens; returns the new ids.

    A tokenizer without a padding token gets its end token for padding. Raises ValueError if the tokenizer's ids have
    gaps, because the marks would then get ids of other tokens.
    """
    known = tokenizer.get_vocab()
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    missing = [AddedToken(mark, special=True, normalized=False) for mark in MARKS if mark not in special]
    tokenizer.add_tokens(missing, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or "<|im_end|>"
    new_ids = {tokenizer.convert_tokens_to_ids(mark): mark for mark in MARKS if mark not in known}
    if taken := sorted(new_ids.keys() & set(known.values())):
        raise ValueError(
            f"A tokenizer must have ids without gaps, so that marks can be added; {new_ids[taken[0]]} would be "
            f"{taken[0]}, which is another token. Fill the gaps in its tokenizer.json."
        )
    return sorted(new_ids)


def media_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str | dict[str, str], str | None]:
    """The tokenizer's chat template with media added, and None; or ChatML, and the reason."""
    own = tokenizer.chat_template
    # A token that the tokenizer puts before every text begins a chat too.
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    chatml = "{{- bos_token -}}\n" + CHAT_TEMPLATE if begins else CHAT_TEMPLATE
    if own in (CHAT_TEMPLATE, chatml):  # the language model of a CrossLMM
        return own, None
    if own is None:
        return chatml, "the language model has no chat template: ChatML is used"
    try:
        if isinstance(own, dict):
            return {name: _with_media(tokenizer, template) for name, template in own.items()}, None
        return _with_media(tokenizer, own), None
    except (TemplateError, TypeError, ValueError) as error:
        return chatml, f"the language model's chat template cannot take media ({error}): ChatML is used"


def _with_media(tokenizer: PreTrainedTokenizerBase, own: str) -> str:
    """Wraps a template in `MEDIA_TEMPLATE`. Raises ValueError, TypeError or TemplateError if that does not work."""
    user = {"role": "user", "content": "Why?"}
    spaced = _write(tokenizer, own, [user, {"role": "assistant", "content": f" {HOLLOW} "}])
    if spaced.count(HOLLOW) != 1:
        raise ValueError("it changes the assistant's text")
    is_trimmed = f" {HOLLOW} " not in spaced
    end = spaced.split(HOLLOW)[1].removeprefix("" if is_trimmed else " ").rstrip()
    # The template's own generation marks would be counted at their place in the macro, not in the output.
    unmarked = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", own.removesuffix("\n"))
    unmarked = re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", unmarked)
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content in own]
    named = (value for value in tokenizer.special_tokens_map.values() if isinstance(value, str))
    marks = {*MARKS, *named, *(token.content for token in added if token.special)}
    words = {token.content for token in added} - marks
    template = MEDIA_TEMPLATE.replace("@MARKS@", json.dumps(sorted(marks)))
    template = template.replace("@WORDS@", json.dumps(sorted(words)))
    template = template.replace("@TRIM@", " | trim" if is_trimmed else "")
    template = template.replace("@END@", json.dumps(end)).replace("@HOLLOW@", HOLLOW).replace("@OWN@", unmarked)
    _check_template(tokenizer, own, template, end)
    return template


def _check_template(tokenizer: PreTrainedTokenizerBase, own: str, template: str, end: str) -> None:
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "Why?"}
    chats: list[list[dict[str, Any]]] = [
        [user],
        [user, {"role": "assistant", "content": "So. "}, user],
        [system, user],
    ]
    for chat in chats:
        try:
            expected = [_write(tokenizer, own, chat, add_generation_prompt=prompt) for prompt in (True, False)]
        except TemplateError:  # for example, of a template without system prompts
            continue
        if [_write(tokenizer, template, chat, add_generation_prompt=prompt) for prompt in (True, False)] != expected:
            raise ValueError("its output changes inside a macro")
    for kind, mark in (("video", VIDEO_TOKEN), ("image", IMAGE_TOKEN)):
        content = [{"type": kind}, {"type": "text", "text": "Why?"}]
        written = _write(tokenizer, template, [{"role": "user", "content": content}])
        if f"<|vision_start|>{mark}<|vision_end|>Why?" not in written:
            raise ValueError("it drops media")
    encoded = tokenizer.apply_chat_template(
        [user, {"role": "assistant", "content": "So."}],
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marked = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    if tokenizer.decode(marked).strip() != f"So.{end}".strip():
        raise ValueError("the assistant's text cannot be marked in it")


def _write(tokenizer: PreTrainedTokenizerBase, template: str, chat: list[dict[str, Any]], **options: Any) -> str:
    return tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **options)
