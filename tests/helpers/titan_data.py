"""Text and a tokenizer for torchtitan's ``c4_test``; every layout trains on the same batches.

torchtitan's loader gives data-parallel rank r of w the r-th w-th of the documents, so that a run
on more ranks would see other batches. Here a document is exactly one sequence, and the documents
are written in the order in which that many ranks read global batch after global batch.
"""

import json
import re
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

SEQUENCE = 64
"""Tokens in a sequence."""

BATCH = 4
"""Sequences in a global batch."""

STEPS = 12
"""Global batches in a data set: more than any run takes, so none reaches the end."""

VOCABULARY = 2000
"""Words known to the tokenizer; torchtitan's debug models have 2048 embeddings."""

SPECIAL = ("<unk>", "<s>", "</s>")


@cache
def _words() -> list[str]:
    library = Path(sysconfig.get_path("stdlib"))
    text = "\n".join((library / name).read_text() for name in ("argparse.py", "typing.py"))
    return re.findall(r"\w+|[^\w\s]", text)


def write_tokenizer(folder: Path) -> None:
    """A word tokenizer in Hugging Face's format; ties are broken by the alphabet, not by chance."""
    counts = Counter(_words())
    known = sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - len(SPECIAL)]
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    specials = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "unk_token": SPECIAL[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(specials))


def documents(degree: int, start: int = 0) -> list[str]:
    """The documents in the order that makes ``degree`` readers see the global batches in turn.

    Args:
        degree: data-parallel ranks.
        start: global batches to leave out, for a run resumed on another number of ranks, whose
            loader torchtitan cannot resume.
    """
    words, length = _words(), SEQUENCE - 1  # the tokenizer adds one token at each end
    texts = [" ".join(words[i * length : (i + 1) * length]) for i in range(STEPS * BATCH)]
    assert texts[-1].count(" ") == length - 1, "the text is too short"
    share = BATCH // degree
    batches = range(start, STEPS)
    return [
        texts[batch * BATCH + rank * share + i]
        for rank in range(degree)
        for batch in batches
        for i in range(share)
    ]


def write_data(folder: Path, degree: int, start: int = 0) -> Path:
    """Writes them as a data set that ``--dataloader.dataset_path`` takes."""
    data = folder / f"c4_test_{degree}_{start}"
    data.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) for text in documents(degree, start)]
    (data / "data.jsonl").write_text("\n".join(lines) + "\n")
    return data
