"""Pages of docs/: their code blocks, and how to follow them in a folder."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.support import REPOSITORY
from whisper_aut.cli import main

DOCS = REPOSITORY / "docs"
BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """Its command lines, without comments; continued lines are one."""
        joined = self.text.replace("\\\n", " ")
        return [
            words for line in joined.splitlines() if (words := shlex.split(line, comments=True))
        ]


def blocks_of(page: Path, section: str = "") -> list[Block]:
    """Return the code blocks of a page, or of one of its sections."""
    text = page.read_text()
    if section:
        _, _, text = text.partition(f"\n## {section}\n")
        assert text, f"{page.name} has no section {section!r}"
        text = text.partition("\n## ")[0]
    blocks = [Block(*found) for found in BLOCK.findall(text)]
    assert len(blocks) == len(re.findall("^```", text, re.M)) / 2, (
        f"{page.name} has a fence that is not understood"
    )
    return blocks


def follow(blocks: list[Block], *, commands: bool) -> dict[str, object]:
    """Write the blocks with a title as files, run Python and, if wanted, commands.

    Returns:
        The names that the Python blocks defined.
    """
    names: dict[str, object] = {}
    for block in blocks:
        if block.title:
            Path(block.title).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, "page", "exec"), names)
        elif block.language == "" and commands:
            for program, *arguments in block.commands:
                assert program == "whisper-aut"
                assert main(arguments) == 0, arguments
    return names
