"""What a sweep found, in words: the lead that needs no further knowledge, comparisons as sentences, and what
must be known of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from training.objectives.registry import settings_of
from tuning.report import progress
from tuning.report.comparison import Comparison
from tuning.report.configurations import Configuration, Content, best_of, configurations
from tuning.report.progress import ended
from tuning.report.significance import FEWEST_SEEDS

_SUBJECTS = {"align": ("Descriptions", "raise", "lower")}
"""What a method is to somebody who only knows what it works with, and the verbs that go with it."""
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def title(contents: Sequence[Content]) -> str:
    """Of a report of one or more sweeps."""
    if {trial["arm"] for content in contents for trial in content["trials"]} == {"baseline"}:
        return "How the plain model did"
    subjects = {_lower(_subject(content)[0]) for content in contents}
    of = subjects.pop() if len(subjects) == 1 else "the methods"
    return f"What {f'the {of}' if of == 'descriptions' else of} did for the small model"


def lead(content: Content, found: Sequence[Comparison]) -> list[str]:
    """What was found, in words for everybody: a sentence a backbone, or why nothing is known.

    Args:
        content: of the sweep.
        found: its comparisons, as `comparisons` corrected them.
    """
    so_far = "So far: " if content["state"] == "running" else ""
    tested = [each for each in found if each.verdict != "too few seeds"]
    if tested:
        return [f"{so_far}{_found(content, _foremost(group))}" for group in _by_backbone(tested)]
    done, planned = ended(content), progress.planned(content)
    if done < planned and content["state"] in ("running", "interrupted"):
        return [f"Not known yet: {done} of {planned} trainings have run."]
    if found:
        return [_too_few(content, group[0]) for group in _by_backbone(found)]
    return [_without_comparison(content)]


def _by_backbone(found: Sequence[Comparison]) -> list[list[Comparison]]:
    backbones = dict.fromkeys(each.method.backbone for each in found)
    return [[each for each in found if each.method.backbone == name] for name in backbones]


def _foremost(found: list[Comparison]) -> Comparison:
    """A gain that is shown goes before a higher one that is not."""
    return next((each for each in found if each.verdict == "a gain"), found[0])


def _found(content: Content, best: Comparison) -> str:
    name, (before, after) = best.method.backbone, _levels(best)
    subject, more, less = _subject(content)
    told = f"({_difference(best)}, {_interval(best)}, {_seeds(best)})"
    pictures = f"{best.split} pictures"
    if best.metric.name == "top1":
        values = f"from {before} to {after} % of {pictures} right {told}"
    else:
        values = f"from {before} to {after} {best.metric.title} on {pictures} {told}"
        more, less = ("improve", "worsen") if more == "raise" else ("improves", "worsens")
    if best.verdict == "no difference shown":
        unit = (
            f" % of {pictures} right" if best.metric.name == "top1" else f" {best.metric.title} on {pictures}"
        )
        said = (
            f"Nothing beats the plain model of {name}: {before}{unit}, and {after} with {_lower(subject)} "
            f"{told}; chance alone can make such a difference."
        )
    else:
        said = f"{subject} {more if best.verdict == 'a gain' else less} {name} {values}."
    return f"{said} {_flattery(best)}".strip()


def _flattery(best: Comparison) -> str:
    if not best.flatters:
        return ""
    chosen = (
        f"{best.among} settings were tried and this one chosen on these very pictures, so the figure flatters"
    )
    return f"{chosen}." if best.is_final else f"{chosen}; a final comparison on fresh seeds would tell."


def _too_few(content: Content, best: Comparison) -> str:
    subject = f"{_lower(_subject(content)[0])} ({best.method.words})"
    differ = "differ" if content["objective"] in _SUBJECTS else "differs"
    return (
        f"Not known: {subject} {differ} from the plain {best.method.backbone} by {_difference(best)} on "
        f"{_seeds(best)}, and fewer than "
        f"{_NUMBERS[FEWEST_SEEDS]} seeds cannot tell that from chance."
    )


def _without_comparison(content: Content) -> str:
    found = configurations(content)
    best = best_of(found)
    if best is None:
        return "Nothing is known: no training came to its end."
    unit = " %" if best.metric.unit == "%" else ""
    level = f"{best.metric.title} {_shown(best, best.mean)}{unit} on {content['eval_split']} pictures"
    told = f"{best.backbone}, {best.words}: {level} ({_count(len(best.scores()), 'seed')})"
    if all(each.is_baseline for each in found):
        return f"Only the plain model was trained, so nothing is said of a gain over it. {told}."
    many = sum(1 for each in found if each.scores())
    of = f"The best of {many} settings is {told}" if many > 1 else told
    return f"{of}. No plain model was trained beside it on the same seeds, so nothing can be said of a gain."


def _subject(content: Content) -> tuple[str, str, str]:
    name = content["objective"].rpartition(".")[2]
    return _SUBJECTS.get(content["objective"], (f"The method {name}", "raises", "lowers"))


def _lower(subject: str) -> str:
    return subject[0].lower() + subject[1:]


def _shown(best: Configuration, value: float) -> str:
    return f"{value:.{_digits(best)}f}"


def _digits(best: Configuration) -> int:
    """A percentage is read with one digit; what has none is shown as it is in tables."""
    return best.metric.digits - (best.metric.unit == "%")


def _levels(best: Comparison) -> tuple[str, str]:
    before, after = (_shown(best.method, statistics.fmean(each)) for each in (best.befores, best.afters))
    return before, after


def _difference(best: Comparison) -> str:
    points = " points" if best.metric.unit == "%" else ""
    return f"{best.mean:+.{_fine(best)}f}{points}"


def _fine(best: Comparison) -> int:
    """Digits of a difference and its bounds: one more where a bound would read as zero, and on which side of
    it would be lost."""
    digits = _digits(best.method)
    return digits + any(value and round(value, digits) == 0 for value in (best.mean, *best.interval))


def _interval(best: Comparison) -> str:
    low, high = best.interval
    if math.isinf(low):
        return "the same on every seed"
    return f"95 % {low:+.{_fine(best)}f} to {high:+.{_fine(best)}f}"


def _seeds(best: Comparison) -> str:
    return _count(len(best.seeds), "fresh seed" if best.is_final else "seed")


def _count(number: int, what: str) -> str:
    return f"{_NUMBERS[number] if number < len(_NUMBERS) else number} {what}{'s' if number != 1 else ''}"


def sentence(result: Comparison) -> str:
    """One comparison in words and figures."""
    metric, setting = result.metric, f"{result.method.backbone}, {result.method.words}"
    over = f"over the {result.baseline.words}" if result.baseline.shown else "over the baseline"
    mean, low, high = (f"{value:+.{metric.digits}f}" for value in (result.mean, *result.interval))
    told = f"{setting}: {mean} {metric.difference} {over}"
    seeds = f"{len(result.seeds)} {'fresh ' if result.is_final else ''}seeds"
    if len(result.seeds) < 2:
        return f"{told} on one seed: {result.verdict}"
    interval = "the same on all" if math.isinf(result.interval[0]) else f"95 % [{low}, {high}],"
    tested = "" if math.isnan(result.adjusted) else f", {p_values(result)}"
    return f"{told}, {interval} {seeds}{tested}: {result.verdict}"


def p_values(result: Comparison) -> str:
    """p, and beside it the corrected one where it is another."""
    corrected = f" ({p_shown(result.adjusted)} corrected)" if result.adjusted != result.p else ""
    return f"p {p_shown(result.p)}{corrected}"


def _measured(content: Content, found: Sequence[Comparison]) -> str:
    shown = {each.method.number for each in found}
    tested = {
        trial["configuration"]
        for trial in content["trials"]
        if trial["stage"] == "final" and trial["arm"] == "method" and trial["test"] is not None
    }
    split, earlier = found[0].split, len(tested - shown)
    if not earlier:
        return f"Measured once, on {split} pictures, on which nothing was chosen."
    others = "an earlier winner was" if earlier == 1 else f"{earlier} earlier winners were"
    return f"Measured on {split} pictures, on which nothing was chosen; {others} measured on them, too."


def p_shown(value: float) -> str:
    """A p-value with two digits that count."""
    if math.isnan(value):
        return "-"
    return "< 0.0001" if value < 0.0001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def notes(content: Content, found: Sequence[Comparison]) -> list[str]:
    """What a reader must know of the comparisons: on which pictures, how chosen, what is left out, how many
    seeds would do."""
    lines = []
    if any(each.flatters for each in found):
        tried = max(each.among for each in found)
        luck = "" if found[0].is_final else "; the highest of several is partly the luckiest"
        lines.append(
            f"These figures flatter: {tried} settings were tried and the best chosen on the {found[0].split} "
            f"pictures that they are measured on{luck}."
        )
    elif any(each.untouched for each in found):
        lines.append(_measured(content, found))
    if found and (beside := _beside(content)):
        lines.append(
            f"All but the plain model have {beside}, whose part in the differences is not told apart."
        )
    for each in found:
        if each.missing:
            left_out = ", ".join(f"{seed} ({_why(each, seed)})" for seed in each.missing)
            lines.append(f"{each.method.backbone}, {each.method.words}: without seeds {left_out}.")
    for each in found:
        low, high = each.over_pictures
        if math.isfinite(low):
            digits = each.metric.digits
            wide = f"95 % [{low:+.{digits}f}, {high:+.{digits}f}]"
            setting = f"{each.method.backbone}, {each.method.words}"
            lines.append(f"{setting}: of other pictures of the kind, and other seeds, {wide}.")
    needed = [each.seeds_needed for each in found if each.seeds_needed]
    if needed:
        what = "a point" if found[0].metric.unit == "%" else "a hundredth of the baseline"
        span = f"{min(needed)}" if min(needed) == max(needed) else f"{min(needed)} to {max(needed)}"
        lines.append(f"To show a difference of {what} four times in five, some {span} seeds are needed.")
    return lines


def _beside(content: Content) -> str:
    """What a sweep gives the method throughout and its baseline not, beside the axes of the method."""
    kind, shared = settings_of(content["objective"]), content["shared"]
    swept = {name for trial in content["trials"] for name in trial["values"]}
    return ", ".join(
        f"{name.replace('_', '-')} {shared[name]}"
        for name, plain in (kind.baseline or {}).items()
        if name not in kind.axes and name not in swept and shared.get(name, plain) != plain
    )


def _why(each: Comparison, seed: int) -> str:
    states = [
        f"{'baseline ' if side.is_baseline else ''}{trial['status']}"
        for side in (each.method, each.baseline)
        for trial in side.trials
        if trial["seed"] == seed and seed not in side.whole()
    ]
    return ", ".join(states) or ("not tested" if each.untouched else "of one side only")
