"""What a notebook's stored outputs must be: clean, and equal to what a run gives apart from stated noise."""

from __future__ import annotations

import base64
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

RELATIVE_TOLERANCE = 0.01
ABSOLUTE_TOLERANCE = 0.011
LARGEST_PICTURE_BYTES = 100_000

# Digits inside a word (a sha256, `top2`) are text and must be equal. The group is atomic: it takes a number whole.
NUMBER = re.compile(r"(?<![\w.])[-+−]?(?>\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?)")
UNIT = r"(?:ns|µs|us|ms|s|sec|secs|seconds?|min|mins|minutes?|h|hours?)\b"
DURATION = re.compile(rf"(?<![\w.])(?>\d+(?:,\d{{3}})*(?:\.\d+)?)\s?{UNIT}(?!\w)(?:\s\d+(?:\.\d+)?\s?{UNIT})*")
TIMED_FIELD = re.compile(r"((?:seconds|_s)['\"]?\s*[:=]\s*)(?>\d+(?:\.\d+)?(?:e[-+]?\d+)?)")
RULE = re.compile(r"([─━═╌┄—_=-])\1{2,}")
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

UNCLEAN = {
    "an absolute path": re.compile(
        r"(?<![\w./:<-])/(?:home|root|tmp|usr|opt|var|mnt|work|Users|private|content|workspace)/\w|\b[A-Z]:\\\w"
    ),
    "a warning": re.compile(r"\b\w*Warning: |\bWARNING\b"),
    "a progress bar": re.compile(r"\d%\|| ?(?:it|s)/(?:s|it)\]|\r(?!\n)"),
    "a timestamp": re.compile(r"\b20\d\d-\d\d-\d\d[T ]\d\d:\d\d"),
    "an object's address": re.compile(r" at 0x[0-9a-f]{6,}"),
}

Output = Mapping[str, Any]


def joined(text: str | Sequence[str]) -> str:
    "The text of an output, which notebooks store as a string or as lines."
    return text if isinstance(text, str) else "".join(text)


def texts(output: Output) -> Iterator[tuple[str, str]]:
    "Every text an output shows, with its kind."
    if output["output_type"] == "stream":
        yield output["name"], joined(output["text"])
        return
    for mime, content in sorted(output.get("data", {}).items()):
        if mime.startswith("image/"):
            continue
        yield mime, json.dumps(content, sort_keys=True) if "json" in mime else joined(content)


def pictures(output: Output) -> Iterator[tuple[str, int]]:
    "Every picture of an output: its kind and its size in bytes."
    for mime, content in sorted(output.get("data", {}).items()):
        if mime.startswith("image/"):
            text = joined(content)
            yield mime, len(text.encode()) if "svg" in mime else len(base64.b64decode(text))


def kinds(output: Output) -> list[str]:
    "What an output is made of."
    if output["output_type"] == "stream":
        return [output["name"]]
    return sorted(output.get("data", {})) or [output["output_type"]]


def problems(outputs: Sequence[Output]) -> list[str]:
    "Why these outputs must not be stored; empty where they are clean."
    found = []
    for output in outputs:
        if output["output_type"] == "error":
            found.append(f"an error: {output.get('ename')}: {output.get('evalue')}"[:200])
        if output.get("name") == "stderr":
            found.append(f"text on stderr: {joined(output['text'])[:120]!r}")
        found += [f"a widget: {mime}" for mime in kinds(output) if "widget" in mime]
        for mime, n_bytes in pictures(output):
            if n_bytes > LARGEST_PICTURE_BYTES:
                found.append(f"a picture of {n_bytes:,} bytes ({mime}), more than {LARGEST_PICTURE_BYTES:,}")
        for _, text in texts(output):
            for what, pattern in UNCLEAN.items():
                if match := pattern.search(text):
                    found.append(f"{what}: …{text[max(0, match.start() - 20) : match.end() + 30]!r}…")
    return found


def tidy(outputs: Sequence[Output]) -> list[dict[str, Any]]:
    "Outputs as they are stored: neighbouring streams joined, stderr and colour codes left out."
    kept: list[dict[str, Any]] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if output["output_type"] != "stream":
            kept.append(dict(output))
            continue
        text = ANSI.sub("", joined(output["text"]))
        if kept and kept[-1].get("name") == output["name"]:
            kept[-1]["text"] = joined(kept[-1]["text"]) + text
        else:
            kept.append({**output, "text": text})
    return [output for output in kept if output["output_type"] != "stream" or output["text"]]


def mask_durations(text: str) -> str:
    "The text without how long anything took, and without the padding that follows from it."
    masked = DURATION.sub("<time>", TIMED_FIELD.sub(r"\1<time>", text))
    if masked == text:
        return text
    return RULE.sub(r"\1", re.sub(r"[ \t]+", " ", masked))


def mask_sizes(text: str) -> str:
    "The text without numbers, widths and the number of rows: what two sizes of a run have in common."
    text = re.sub(r"[ \t]+", " ", RULE.sub(r"\1", NUMBER.sub("#", mask_durations(text))))
    text = re.sub(r"#(?:[,;\s]+#)+", "#", text)
    return "\n".join(dict.fromkeys(line.strip() for line in text.splitlines()))


def close(ours: str, theirs: str) -> bool:
    "Whether two numbers are equal: whole ones exactly, others within the tolerance."
    if ours == theirs:
        return True
    if not re.search(r"[.eE]", ours + theirs):
        return False
    a, b = (float(number.replace(",", "").replace("−", "-")) for number in (ours, theirs))
    return abs(a - b) <= max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * max(abs(a), abs(b))) + 1e-9


def same_text(stored: str, fresh: str) -> bool:
    "Whether two texts are equal after masking durations, with their numbers compared as numbers."
    stored, fresh = mask_durations(stored), mask_durations(fresh)
    if NUMBER.split(stored) != NUMBER.split(fresh):
        return False
    return all(map(close, NUMBER.findall(stored), NUMBER.findall(fresh)))


def short_diff(stored: str, fresh: str, n_lines: int = 12) -> str:
    "The lines that differ, a few of them."
    lines = [
        line[:160]
        for line in difflib.unified_diff(stored.splitlines(), fresh.splitlines(), "stored", "run", n=0, lineterm="")
        if not line.startswith("@@")
    ]
    more = [f"… {len(lines) - n_lines} more lines"] if len(lines) > n_lines else []
    return "\n".join(lines[:n_lines] + more)


def difference(stored: Sequence[Output], fresh: Sequence[Output], sized: str | None = None) -> str:
    """How stored outputs differ from a run's; empty where they do not.

    `sized` is None for a cell that must give the same in both sizes, "" where numbers may differ,
    and "words" where only the kinds of output are compared.
    """
    stored, fresh = tidy(stored), tidy(fresh)
    if sized is not None:  # other sizes may print in more or fewer parts, but in the same kinds
        ours, theirs = (sorted({kind for output in outputs for kind in kinds(output)}) for outputs in (stored, fresh))
    else:
        ours, theirs = ([kinds(output) for output in outputs] for outputs in (stored, fresh))
    if ours != theirs:
        return f"kinds of output: stored {ours or 'none'}, run {theirs or 'none'}"
    if sized == "words":
        return ""
    if sized is not None:
        before, after = (
            mask_sizes("\n".join(text for output in outputs for _, text in texts(output)))
            for outputs in (stored, fresh)
        )
        return "" if before == after else short_diff(before, after)
    for was, now in zip(stored, fresh, strict=True):
        for (_, before), (_, after) in zip(texts(was), texts(now), strict=True):
            if not same_text(before, after):
                return short_diff(mask_durations(before), mask_durations(after)) or "only the white space differs"
    return ""
