"""The whole flow on a real language model: inspect, compress, evaluate, save, reload, compare, report."""

import copy
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import models
from .api import calibrate, compress, inspect
from .compressors import KroneckerFactoredSvd
from .core.errors import CalibrationError
from .core.files import write_text
from .core.fingerprint import fingerprint
from .core.report import Report
from .core.statistics import Statistics
from .core.statistics_file import load_statistics, save_statistics
from .models.texts import tokens

PROMPT = "The capital of France is"


@dataclass(frozen=True)
class _Scale:
    """How much of everything a run uses, and the budgets that it makes models of."""

    keeps: tuple[float, ...]
    calibration: int
    evaluation: int
    prefill: int
    decode: int
    repeats: int
    sample: int


FULL = _Scale(keeps=(0.9, 0.8), calibration=16384, evaluation=6144, prefill=512, decode=32, repeats=3, sample=40)
SMOKE = _Scale(keeps=(0.8,), calibration=1024, evaluation=1024, prefill=128, decode=4, repeats=1, sample=8)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def quickstart(
    out: str | Path,
    *,
    smoke: bool = False,
    source: str = "smollm2-135m",
    progress: Callable[[str], None] = _to_stderr,
) -> Report:
    """Compress a language model to 0.9 and 0.8 of its layers' parameters and compare the three.

    Calibrates on sequences sampled from the model itself, and evaluates on the ends of two texts that
    every Python has. Writes the models to ``keep-0.9`` and ``keep-0.8`` and ``report.html``. Finished steps
    are kept in ``cache``: a run that was interrupted goes on where it stopped.

    Args:
        out: folder for everything; made if it is missing.
        smoke: make the smaller model alone, with far fewer tokens; the figures then mean nothing.
        source: what :func:`rankwise.load` takes.
        progress: is told what happens, one line at a time.

    Returns:
        a report with the layers at keep 0.8 as rows, and in its totals ``models``: for the dense model and
        each compressed one file bytes, perplexities and tokens per second.

    Raises:
        ValueError: if ``out`` is a file or holds a model that an earlier run did not make.
    """
    return _Run(Path(out), SMOKE if smoke else FULL, source, progress).run()


class _Run:
    """The steps of one quickstart; each leaves a file that a later run takes up."""

    def __init__(self, out: Path, scale: _Scale, source: str, progress: Callable[[str], None]) -> None:
        if out.exists() and not out.is_dir():
            raise ValueError(f"out must be a folder, {out} is a file; give another path.")
        self.out, self.scale, self.progress = out, scale, progress
        self.cache = out / "cache"
        self.cache.mkdir(parents=True, exist_ok=True)
        self.start = time.perf_counter()
        self.say(f"loading {source}")
        self.dense, self.tokenizer = models.load(source)
        self.statistics: Statistics | None = None
        self.about = f"{fingerprint(self.dense)} {scale}"

    def say(self, text: str) -> None:
        """Report progress with the time since the start."""
        self.progress(f"[{time.perf_counter() - self.start:4.0f} s] {text}")

    def step(self, name: str, what: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the figures of a step: those of an earlier run for the same model and scale, or new ones."""
        path = self.cache / f"{name}.json"
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["about"] == self.about:
                self.say(f"{what}: done in an earlier run")
                return known["figures"]
        self.say(what)
        figures = make()
        write_text(path, json.dumps({"about": self.about, "figures": figures}))
        return figures

    def run(self) -> Report:
        """Do all steps."""
        layers = self.step("inspect", "inspecting the weights of the dense model", self._inspect)
        ids = {
            name: tokens(self.tokenizer, text, limit=self.scale.evaluation, last=True)
            for name, text in models.embedded_texts().items()
        }
        perplexity = {
            "dense": self.step("dense", "evaluating the dense model", lambda: self._perplexity(self.dense, ids))
        }
        made = {f"keep-{keep:g}": self._compressed(keep, ids) for keep in self.scale.keeps}
        perplexity |= {name: figures["perplexity"] for name, figures in made.items()}
        networks = {"dense": self.dense}
        for name in made:
            self.say(f"loading {self.out / name}")
            networks[name] = models.load(self.out / name)[0]
        speed = self.step("speed", "measuring speed", lambda: self._speed(networks, ids["topics"]))
        samples = self.step("samples", "writing a sentence with each model", lambda: self._samples(networks))
        size = {"dense": models.sizes(self.dense)["bytes"]}
        size |= {name: figures["file_bytes"] for name, figures in made.items()}
        rows = {
            name: {
                "file_bytes": size[name],
                **{f"perplexity {text}": value for text, value in perplexity[name].items()},
                **speed[name],
            }
            for name in networks
        }
        least = f"keep-{self.scale.keeps[-1]:g}"
        last = made[least]
        totals = {
            "models": rows,
            "keep": {name: figures["keep"] for name, figures in made.items()},
            "samples": samples,
            "largest difference of a logit after reloading": {n: f["difference"] for n, f in made.items()},
            "seconds": {name: figures["seconds"] for name, figures in made.items()},
        }
        title = f"Quickstart: {type(self.dense).__name__}, dense and compressed; layers of {least}"
        report = Report(title, last["layers"], "layers", totals, last["curves"])
        write_text(self.out / "inspect.html", Report("Weights of the dense model", **layers).to_html())
        write_text(self.out / "report.html", report.to_html())
        self.say(f"the report is {self.out / 'report.html'}; {self.cache} can be deleted")
        return report

    def _inspect(self) -> dict[str, Any]:
        report = inspect(self.dense)
        return {"rows": list(report.rows), "totals": dict(report.totals), "curves": _rounded(report.curves)}

    def _perplexity(self, model: Any, ids: Mapping[str, Tensor]) -> dict[str, float]:
        report = models.evaluate(model, self.tokenizer, ids)
        return {row["name"]: row["perplexity"] for row in report.rows}

    def _statistics(self) -> Statistics:
        if self.statistics is None:
            self.statistics = self._collected()
        return self.statistics

    def _collected(self) -> Statistics:
        path = self.cache / "statistics.safetensors"
        if path.is_file():
            try:
                found = load_statistics(path, self.dense, self.about)
            except CalibrationError as error:
                self.say(str(error))
            else:
                self.say("statistics: collected in an earlier run")
                return found
        self.say(f"sampling {self.scale.calibration:,} tokens from the model and collecting statistics")
        found = calibrate(self.dense, KroneckerFactoredSvd.needs, data="self", tokens=self.scale.calibration)
        save_statistics(found, path, self.dense, self.about)
        return found

    def _compressed(self, keep: float, ids: Mapping[str, Tensor]) -> dict[str, Any]:
        """Make the model of one budget; its folder appears after its figures are known."""
        name = f"keep-{keep:g}"
        folder, staged, known = self.out / name, self.cache / name, self.cache / f"{name}.json"
        if folder.exists() and not known.is_file():
            raise ValueError(f"{folder} was not made by an earlier quickstart; remove it or give another folder.")

        def make() -> dict[str, Any]:
            for old in (staged, folder):
                if old.exists():
                    shutil.rmtree(old)
            model = copy.deepcopy(self.dense)
            report = compress(model, KroneckerFactoredSvd(), keep=keep, data=self._statistics())
            self.say(f"evaluating {name}")
            perplexity = self._perplexity(model, ids)
            self.say(f"saving {name} and reloading it with plain transformers")
            models.save(model, staged, self.tokenizer)
            return {
                "perplexity": perplexity,
                "difference": self._difference(model, staged, next(iter(ids.values()))[:64]),
                "file_bytes": sum(file.stat().st_size for file in staged.glob("*.safetensors")),
                "keep": report.totals["keep"],
                "seconds": report.totals["seconds"],
                "layers": list(report.rows),
                "curves": _rounded(report.curves),
            }

        figures = self.step(name, f"compressing to keep {keep:g} of the parameters", make)
        if not folder.exists():
            staged.rename(folder)
        return figures

    def _difference(self, model: Any, folder: Path, ids: Tensor) -> float:
        from transformers import AutoModelForCausalLM

        other = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            return float((model.eval()(ids[None]).logits - other(ids[None]).logits).abs().max())

    def _speed(self, networks: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
        scale, found = self.scale, {}
        for name, network in networks.items():  # in pairs: see benchmarks/speed.py
            if network is not self.dense:
                pair = {"dense": self.dense, name: network}
                found |= models.speed(
                    pair, ids, prefill=scale.prefill, decode=scale.decode, repeats=scale.repeats
                )
        return found

    def _samples(self, networks: Mapping[str, Any]) -> dict[str, str]:
        return {
            name: models.generate(model, self.tokenizer, PROMPT, tokens=self.scale.sample)
            for name, model in networks.items()
        }


def _rounded(curves: Mapping[str, Any]) -> dict[str, list[float]]:
    """Keep what a plot shows of each curve."""
    return {name: [float(f"{value:.4g}") for value in curve] for name, curve in curves.items()}
