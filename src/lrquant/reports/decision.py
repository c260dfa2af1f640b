"""What a report says first: how much is lost, how much of it is recovered, and what to look at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lrquant.measures.numbers import divergence, number, percent, spread
from lrquant.measures.rows import named
from lrquant.reports.fitting import size_in_words
from lrquant.reports.values import Block, Contents, spans_of
from lrquant.runs.results import Entry, Results, figure, record

_FEW_WINDOWS = 32
_FEW_ITEMS = 200
_TEXTS = 3  # of each measure that the first lines name
_COMPARED = ("full_precision", "round_to_nearest", "quantized")


def first_sentences(contents: Contents) -> list[str]:
    """Size, then each text's perplexity, divergence and the tasks' mean, as far as measured."""
    run, results = contents["run"], contents["results"]
    method = run["method_name"]
    size = size_in_words(contents["fits"], run["sizes"])
    sentences = [] if size is None else [f"Size {size[0]} ({size[1]})."]
    sentences += list(_perplexities(results, method))[:_TEXTS]
    sentences += list(_divergences(results))[:_TEXTS]
    return sentences + list(_means(results, method))


def recovered(scores: Entry) -> float | None:
    """The share of round-to-nearest's loss that learning takes back, of the mean loss in nats:
    ``1 - ln(learned / full) / ln(nearest / full)`` of perplexities; None where there is none."""
    values = [figure(scores.get(name)) for name in _COMPARED]
    full, nearest, learned = (
        v if isinstance(v, float) and 0 < v < math.inf else None for v in values
    )
    if full is None or nearest is None or learned is None or nearest <= full:
        return None
    return 1 - math.log(learned / full) / math.log(nearest / full)


def _perplexities(results: Results, method: str) -> Iterator[str]:
    for text, about, scores in named(results, "perplexity"):
        full, nearest, learned = (figure(scores.get(name)) for name in _COMPARED)
        if not isinstance(learned, float) or not isinstance(full, float):
            continue
        said = f"Perplexity on {text}{about}: {number(full)} in full precision, "
        said += f"{number(learned)} with {method} ({_change(learned, full)})"
        if isinstance(nearest, float):
            said += f", {number(nearest)} with round-to-nearest ({_change(nearest, full)})"
        yield f"{said}{_taken_back(scores)}."


def _change(value: float, full: float) -> str:
    change = value / full - 1
    return f"{'+' if change >= 0 else '−'}{percent(abs(change))}"


def _taken_back(scores: Entry) -> str:
    share = recovered(scores)
    if share is None:
        return ""
    if share < 0:
        return ": more is lost than round-to-nearest loses"
    return f": {_whole(share)} of what round-to-nearest loses is recovered"


def _whole(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def recovered_tile(results: Results) -> tuple[str, str, str] | None:
    """The share that is recovered on the first text of which it is measured."""
    for text, about, scores in named(results, "perplexity"):
        share = recovered(scores)
        if share is not None and share < 0:
            return f"recovered, {text}{about}", "none", "more is lost than round-to-nearest loses"
        if share is not None:
            note = "of the loss that round-to-nearest adds to full precision's"
            return f"recovered, {text}{about}", _whole(share), note
    return None


def _divergences(results: Results) -> Iterator[str]:
    for text, about, variants in named(results, "agreement"):
        scores = record(variants.get("quantized"))
        mean = figure(scores.get("kl_mean"))
        if mean is not None and variants.get("reference", "full_precision") == "full_precision":
            error = _error(figure(scores.get("kl_mean_stderr")))
            same = figure(scores.get("same_top"))
            preferred = (
                f"; {percent(same)} of tokens preferred alike" if isinstance(same, float) else ""
            )
            yield f"KL divergence on {text}{about}: {divergence(mean)}{error} nats{preferred}."


def _error(error: float | str | None) -> str:
    return f" ± {divergence(error)}" if isinstance(error, float) else " ± ?"


def _means(results: Results, method: str) -> Iterator[str]:
    for name, metrics in record(results.get("task_means")).items():
        for metric, means in record(metrics).items():
            variants = record(means)
            told = {key: _mean(record(variants.get(key))) for key in _COMPARED}
            words = {"full_precision": "in full precision", "quantized": f"with {method}"}
            words["round_to_nearest"] = "with round-to-nearest"
            said = [f"{value} {words[key]}" for key, value in told.items() if value]
            if said:
                yield f"{name[:1].upper()}{name[1:]}, {metric}: {', '.join(said)}."


def _mean(scores: Entry) -> str:
    mean = figure(scores.get("mean"))
    return "" if mean is None else spread(mean, figure(scores.get("stderr")))


def warnings(contents: Contents) -> list[str]:
    """What of a run is to be looked at before anybody relies on it."""
    run, results, blocks = contents["run"], contents["results"], contents["blocks"]
    said = list(_of_blocks(blocks))
    if contents["tower_blocks"]:
        said += [f"Vision tower: {line}" for line in _of_blocks(contents["tower_blocks"])]
    if run["learned_blocks"] < run["blocks"]:
        said.insert(0, f"Not finished: {run['learned_blocks']} of {run['blocks']} blocks learned.")
    verdict = record(results.get("max_drop"))
    if verdict.get("acceptable") is False:
        said.insert(0, "The tasks drop by more than was allowed: see Results.")
    if run.get("unpacked_from"):
        said.append(
            f"The model's own weights were quantised already ({run['unpacked_from']}): full "
            "precision here is that of these, not of the original model."
        )
    return [*said, *_of_measures(results, run["calibrated_on"])]


def _of_blocks(blocks: Sequence[Block]) -> Iterator[str]:
    """Blocks that are worse than round-to-nearest, kept their start, or are not finite."""
    pairs = {block["block"]: block["figures"]["loss"] for block in blocks if block["figures"]}
    worse = [
        index
        for index, pair in pairs.items()
        if pair["learned"] is not None
        and pair["round_to_nearest"] is not None
        and pair["learned"] > pair["round_to_nearest"]
    ]
    if worse:
        yield f"Loss above that of round-to-nearest in {spans_of(worse)}, of {len(pairs)}."
    kept = [b["block"] for b in blocks if b["epoch_losses"] and b["best_epoch"] == 0]
    if kept:
        yield f"Nothing learned was better than the start in {spans_of(kept)}: the start was kept."
    odd = [block["block"] for block in blocks if block["non_finite"]]
    if odd:
        yield f"Values that are not finite were met in {spans_of(odd)}."


def _of_measures(results: Results, calibrated_on: Sequence[str]) -> Iterator[str]:
    """What the measures do not tell: of few items, or of other text than was learned on."""
    texts = [
        (t, about, e)
        for kind in ("perplexity", "agreement")
        for t, about, e in named(results, kind)
    ]
    if not texts and not list(named(results, "tasks")):
        yield "Nothing was measured, so nothing here says how good it is."
        return
    few = [_few(*each, "windows", _FEW_WINDOWS) for each in texts]
    few += [_few(*each, "items", _FEW_ITEMS) for each in named(results, "tasks")]
    yield from dict.fromkeys(filter(None, few))
    measured = list(dict.fromkeys(text for text, *_ in texts))
    if measured and not set(measured) & set(calibrated_on):
        other = f"measured on other text: {_joined(measured)}"
        yield f"Calibrated on {_joined(calibrated_on)}, {other}."
    elif measured and set(measured) <= set(calibrated_on):
        yield (
            f"Measured on no other kind of text than it was calibrated on ({_joined(measured)}): "
            "on others it may lose more."
        )


def _few(name: str, about: str, entry: Entry, unit: str, least: int) -> str:
    """That a measure is of few items, or nothing."""
    count = record(entry.get("items")).get("measured")
    if not isinstance(count, int) or count >= least or entry.get("part_of"):
        return ""
    return f"Few {unit}: {name} was measured on {count}."


def _joined(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
