"""What a person asks for: the arguments of an export, checked by themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mbq_runtime.bundle.facts import ACTIVATION_BITS, GROUP_SIZES, KV_BITS
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.errors import UsageError
from mbq_runtime.trust.signature import private_key
from mbq_targets.machines import Target, resolve

from .lines import one_line
from .methods import AUTO_SLICES, METHODS

ENGINE_CHOICES = {"onnx": ("onnx",), "tvm": ("tvm",), "both": ("onnx", "tvm")}
"""Engines by the value of ``--engine``.  A GPU target has an engine of its own."""

ROUTER_CHOICES = ("auto", "static", "norm", "mlp")
GROUP_SIZE_CHOICES = ("auto", *map(str, GROUP_SIZES))
KV_CHOICES: tuple[int | str, ...] = ("auto", *KV_BITS)


_SEEDS = 1 << 63
_MOST = 10**9
"""More steps, or tokens, than any export can use."""


@dataclass(frozen=True)
class Options:
    """The arguments of one export.

    model: Hugging Face folder or id, a GGUF file, or the name of a packaged model;
    outputs: the target of each folder to write; one calibration serves them all;
    engines: names of ``write.engines.WRITERS``; a bundle runs on the first unless its user names another;
    profiles: slice widths; with several, each is calibrated and the one that measures better is written;
    group_size: weights per scale, or "auto";
    activation_bits: bits of the integers that processors round activations to;
    method: a name in ``METHODS``;
    tune_steps: steps of end-to-end tuning, or None for the method's own number;
    router: a name in ``routing.kinds.ROUTERS``, or "auto" for the best of them;
    floor_ratio: the highest acceptable perplexity at the quality floor, over the original model's;
    calib_data: the text, as ``data.windows.open_source`` takes it;
    calib_tokens: how many tokens of it are used, or None for the method's own number;
    device: where to calibrate, as ``devices.choose`` takes it;
    seed: seed of all random numbers;
    force: whether existing bundles are replaced;
    sign: file of a private Ed25519 key that signs the bundles, or None;
    kv_bits: bits of a cached key or value, or "auto": 8 where there are kernels for them, else 32.
    """

    model: str
    outputs: dict[Path, Target]
    engines: tuple[str, ...]
    profiles: tuple[SliceProfile, ...]
    group_size: str
    activation_bits: int
    method: str
    tune_steps: int | None
    router: str
    floor_ratio: float
    calib_data: str | None
    calib_tokens: int | None
    device: str
    seed: int
    force: bool
    sign: Path | None = None
    kv_bits: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--group-size", self.group_size, GROUP_SIZE_CHOICES),
            ("--activations", self.activation_bits, ACTIVATION_BITS),
            ("--kv", self.kv_bits, KV_CHOICES),
            ("--method", self.method, tuple(METHODS)),
            ("--router", self.router, ROUTER_CHOICES),
        ):
            if value not in known:
                raise UsageError(f"{option} {value!r} is not known; choose one of: {', '.join(map(str, known))}")
        if not 0 <= self.seed < _SEEDS:
            raise UsageError(f"--seed {one_line(str(self.seed), 24)}: a whole number from 0 to 2^63 - 1 is needed")
        if not 1 <= self.floor_ratio < math.inf:
            raise UsageError(
                f"--floor-ratio {self.floor_ratio:g}: 1 or more, and finite, is needed; 1.25 is the default"
            )
        if self.tune_steps is not None and not 0 <= self.tune_steps <= _MOST:
            raise UsageError(f"--tune-steps {one_line(str(self.tune_steps), 24)}: a number from 0 to {_MOST} is needed")
        if self.calib_tokens is not None and self.calib_tokens > _MOST:
            raise UsageError(f"--calib-tokens {one_line(str(self.calib_tokens), 24)}: at most {_MOST} are needed")
        for output in self.outputs:
            _check_path(output)
        if self.sign is not None:
            private_key(self.sign)

    @classmethod
    def of(
        cls,
        model: str | Path,
        targets: Iterable[str],
        *,
        output: str | Path | None,
        engine: str,
        slices: str,
        group_size: int | str,
        **rest: Any,
    ) -> Options:
        """Options from the arguments of ``mbq_export.export``.

        Args:
            model: see ``Options``.
            targets: names of machines in ``mbq_targets.machines.TARGETS``.
            output: the folder to write; with several targets, the folder of their folders.  None: ``bundles``.
            engine: a key of ``ENGINE_CHOICES``.
            slices: slice widths, such as "3,1,2,2", or "auto" for ``AUTO_SLICES``.
            group_size: weights per scale, or "auto".
            rest: the fields of ``Options`` that are left.

        Raises:
            UsageError: a value is not known.
        """
        if isinstance(targets, str):
            raise UsageError(f"targets {targets!r}: needed a list of names, such as [{targets!r}]")
        machines = {name: resolve(name) for name in targets}
        if not machines:
            raise UsageError("targets: there is none; needed names such as arm64")
        profiles = tuple(SliceProfile.parse(text) for text in (AUTO_SLICES if slices == "auto" else [slices]))
        if engine not in ENGINE_CHOICES:
            raise UsageError(f"--engine {engine!r} is not known; choose one of: {', '.join(ENGINE_CHOICES)}")
        return cls(
            model=str(model),
            outputs=_output_folders(None if output is None else Path(output), str(model), machines),
            engines=ENGINE_CHOICES[engine],
            profiles=profiles,
            group_size=str(group_size),
            **rest,
        )


def _check_path(output: Path) -> None:
    """Refuse a name that no folder can have."""
    if not output.name:
        raise UsageError(f"--output {output}: it names no folder; give a name, such as bundles/mine")
    try:
        with suppress(FileNotFoundError):
            output.lstat()
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {one_line(str(output), 80)}: {error}; choose another --output") from None


def _output_folders(output: Path | None, model: str, targets: dict[str, Target]) -> dict[Path, Target]:
    stem = model.rstrip("/").split("/")[-1].removesuffix(".gguf")
    if output is not None and len(targets) == 1:
        return dict(zip([output], targets.values(), strict=True))
    folder = output or Path("bundles")
    return {folder / f"{stem}-{name}": target for name, target in targets.items()}
