"""A whole comparison: refuse early what would fail, then measure one side after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbq_export.data import texts, windows
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.loading import load, read_config
from mbq_export.model.source import ModelSource, locate
from mbq_export.progress import Report, staged
from mbq_runtime.errors import UsageError
from mbq_runtime.perplexity import cut_windows, read_text

from . import last_word, report, weights
from .harness import Reference, Side
from .rivals import METHODS, Bench, check_bundle, reference

_BITS = range(2, 9)


@dataclass(frozen=True)
class Settings:
    """What the command line asks for.

    model: as for an export; bundle: a bundle of this model, or None; data: names of texts, or files;
    methods: names in ``rivals.METHODS``, or None for all that are installed; bits: of fixed-width methods;
    avg_bits: budgets of the bundle; group_size: weights per scale; windows: of each text;
    context: tokens in a window; calib_data: as for an export; calib_windows: windows to calibrate on;
    last_words: passages of the task of last words; tasks: lm-eval's names;
    lm_eval_limit: examples of each task, or None for all; lm_eval_path: a folder of more task files, or None;
    seed: of random numbers.
    """

    model: str
    bundle: Path | None
    data: tuple[str, ...]
    methods: tuple[str, ...] | None
    bits: tuple[int, ...]
    avg_bits: tuple[float, ...]
    group_size: int
    windows: int
    context: int
    calib_data: str | None
    calib_windows: int
    last_words: int
    tasks: tuple[str, ...]
    lm_eval_limit: int | None
    lm_eval_path: Path | None
    seed: int


@dataclass(frozen=True)
class Prepared:
    """A checked comparison.

    settings: what was asked for; source: where the model lies; calibration: the text that methods calibrate on;
    texts: by the name that was asked for, None for one that the model writes; methods: names of those to measure;
    left_out: messages about methods that are not installed.
    """

    settings: Settings
    source: ModelSource
    calibration: windows.TextSource
    texts: dict[str, str | None]
    methods: list[str]
    left_out: list[str]


def prepare(settings: Settings) -> Prepared:
    """Read the texts and refuse what would fail later.

    Args:
        settings: what is asked for.

    Raises:
        UsageError: a setting is unknown or does not fit the model.
        ModelError: the model cannot be read.
    """
    _check_numbers(settings)
    source = locate(settings.model)
    decoder = read_config(source)
    for name, (_, width) in decoder.unit_shapes().items():
        if width % settings.group_size:
            raise UsageError(f"--group-size {settings.group_size} does not divide K = {width} of {name}")
    contents = {name: _text(name) for name in texts.expanded(settings.data)}
    methods, left_out = [], []
    for name in settings.methods or METHODS:
        if name not in METHODS:
            raise UsageError(f"--methods {name}: there is no such method; there are {', '.join(METHODS)}")
        method = METHODS[name]
        if decoder.experts is not None and not method.experts:
            able = ", ".join(other for other, of in METHODS.items() if of.experts)
            left_out.append(f"{name} is left out, {source.name} has experts: methods that take them are {able}")
        elif method.available:
            methods.append(name)
        elif method.needs:
            left_out.append(f"{name} is left out, it needs {method.needs[1]}: pip install {method.needs[1]}")
    if settings.methods and left_out:
        raise UsageError("; ".join(left_out))
    if settings.tasks:
        _lm_eval()
    if settings.bundle is not None and "bundle" in methods:
        check_bundle(settings.bundle, decoder, source.name, settings.avg_bits)
    return Prepared(settings, source, windows.open_source(settings.calib_data), contents, methods, left_out)


def _check_numbers(settings: Settings) -> None:
    for bits in settings.bits:
        if bits not in _BITS:
            raise UsageError(f"--bits {bits}: needed whole numbers from {_BITS[0]} to {_BITS[-1]}")
    for option, value, least in (
        ("--group-size", settings.group_size, 1),
        ("--windows", settings.windows, 1),
        ("--context", settings.context, 2),
        ("--calib-windows", settings.calib_windows, 1),
        ("--last-words", settings.last_words, 0),
    ):
        if value < least:
            raise UsageError(f"{option} {value}: needed a whole number from {least}")


def _text(name: str) -> str | None:
    if name in texts.SAID:
        return None
    return texts.PACKAGED[name]() if name in texts.PACKAGED else read_text(Path(name))


@dataclass(frozen=True)
class Results:
    """What is measured so far.

    texts: one result per text; linear_weights: number of weights in all linear layers that a token reads;
    block_weights: without the head.
    """

    texts: list[report.TextResult]
    linear_weights: int
    block_weights: int

    def document(self, facts: dict[str, Any]) -> dict[str, Any]:
        """All figures, for JSON.

        Args:
            facts: about the run; they are put first.
        """
        return report.document(self.texts, facts)

    def markdown(self) -> str:
        """All figures, as tables."""
        return report.markdown(self.texts, self.linear_weights, self.block_weights)


@dataclass(frozen=True)
class _Ground:
    """One text, ready to be predicted."""

    reference: Reference
    passages: list[last_word.Passage]
    result: report.TextResult


def run(prepared: Prepared, folder: Path, progress: Report) -> Iterator[Results]:
    """Measure one side after the other, and yield the same results after each.

    Args:
        prepared: the comparison.
        folder: for files that are not needed afterwards.
        progress: told how far the work is.
    """
    settings = prepared.settings
    progress("loading the model", 0, 1)
    checkpoint = load(prepared.source)
    progress("loading the model", 1, 1)
    calibration, _ = windows.calibration_windows(
        checkpoint, prepared.calibration, settings.calib_windows, 1, settings.context
    )
    bench = Bench(
        checkpoint,
        calibration,
        settings.group_size,
        settings.bits,
        settings.bundle,
        settings.avg_bits,
        settings.seed,
        folder,
    )
    layers = weights.Layers.of(checkpoint)
    block_weights = weights.count(checkpoint, layers.blocks)
    original = reference(bench)
    with ExitStack() as stack:
        grounds = [_ground(prepared, checkpoint, name, original, progress) for name in prepared.texts]
        for ground in grounds:
            stack.enter_context(ground.reference)
        results = Results(
            [ground.result for ground in grounds],
            block_weights + weights.count(checkpoint, [layers.head]),
            block_weights,
        )
        _add(prepared, checkpoint, original, grounds, progress)
        yield results
        for method in prepared.methods:
            progress(f"preparing {method}", 0, 1)
            for side in METHODS[method].sides(bench):
                _add(prepared, checkpoint, side, grounds, progress)
                yield results


def _ground(
    prepared: Prepared,
    checkpoint: Checkpoint,
    name: str,
    original: Side,
    progress: Report,
) -> _Ground:
    settings, opening, content = prepared.settings, checkpoint.opening_tokens, prepared.texts[name]
    if content is None:
        content = texts.SAID[name](checkpoint, progress)
    tokens = checkpoint.tokens(content)
    windows = cut_windows(tokens, settings.context, opening, settings.windows)
    if len(windows) < settings.windows:
        raise UsageError(f"--data {name}: it has {len(windows)} windows, {settings.windows} are asked for")
    passages = last_word.passages(content, checkpoint.tokenizer, settings.last_words, opening)
    measured = Reference(original, windows, staged(progress, f"measuring fp32 on {name}"))
    return _Ground(measured, passages, report.TextResult(name, len(windows), []))


def _add(prepared: Prepared, checkpoint: Checkpoint, side: Side, grounds: Sequence[_Ground], progress: Report) -> None:
    zero_shot = _zero_shot(prepared.settings, checkpoint, side)
    for ground in grounds:
        at = f"{side.name} on {ground.result.name}"
        fp = ground.reference.scores
        scores = fp if side.method == "fp32" else ground.reference.measure(side, staged(progress, f"measuring {at}"))
        answers = last_word.right(side.forward, ground.passages, staged(progress, f"predicting last words: {at}"))
        found = last_word.accuracy(answers) if answers else None
        ground.result.rows.append(report.Row.of(side, scores, fp, found, zero_shot))


def _zero_shot(settings: Settings, checkpoint: Checkpoint, side: Side) -> dict[str, float]:
    if not settings.tasks:
        return {}
    zero_shot = _lm_eval()
    model = zero_shot.SideModel(
        side.forward, checkpoint.tokenizer, checkpoint.opening_tokens, checkpoint.decoder.context_length
    )
    path = str(settings.lm_eval_path) if settings.lm_eval_path else None
    found: dict[str, float] = zero_shot.evaluate(model, settings.tasks, settings.lm_eval_limit, path)
    return found


def _lm_eval() -> Any:
    try:
        from . import zero_shot
    except ImportError as error:
        raise UsageError(f"--lm-eval needs a package that is not installed ({error}): pip install lm-eval") from None
    return zero_shot
