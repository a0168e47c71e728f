"""A tiny random Llama on disk that can chat: the tiny tokenizer with a chat template. Nothing here imports handloom."""

from __future__ import annotations

from pathlib import Path

from tiny_models import save, tiny_llama

TEMPLATE = (
    "{% for message in messages %}<|bos|>{{ message.role }}\n{{ message.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)
TRIMMING_TEMPLATE = TEMPLATE.replace("message.content", "message.content | trim | upper")


def save_chat(folder: Path, *, template: str = TEMPLATE, context: int = 1024) -> Path:
    """Write the checkpoint; returns the folder."""
    save(tiny_llama(max_position_embeddings=context), folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder
