"""A tuning from end to end: text, records, training, report, folder.

A run that was cut off goes on from the last group of records or the last checkpoint,
and ends with the same drafter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma4_text

from ..checkpoints.checkpoint import TRAINING_NAME, read_json
from ..checkpoints.hub import fetch, hub_id
from ..checkpoints.staging import check_can_make, check_free_space, check_place
from ..checkpoints.template_files import missing_template_note
from ..cli.tables import size
from ..errors import DataError
from ..machine import describe_machine
from ..models.drafter import Drafter
from ..models.families import family_of
from ..models.target import Target, text_model
from ..pair.load import load
from ..pair.pair import Pair, named_arrays, pair_of
from ..sampling.params import SamplingParams
from .data.documents import DocumentReader, Lengths
from .keys import texts_key, training_key
from .origin import Origin, begin_with
from .recording import workplace
from .recording.material import Chosen, Writing, choose, write_all
from .recording.records import Records, record_bytes
from .recording.workplace import Workplace
from .report.card import usage
from .report.measured import Measured, Point
from .report.measuring import measure
from .report.report import Report, write_report
from .report.result import write_drafter
from .report.speedup import predict
from .request import TuneRequest
from .training.adapters import add_adapters, dequantized, fuse_adapters, trainable
from .training.objective import Objective
from .training.trainer import Material, Trainer
from .training.unrolling import Cutter, places_in_memory

_LORA_SCALE = 20.0  # mlx-lm's

# Called with what is being done and out of how many; gives a function to call with how
# many are done.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Tell nobody how far work is."""
    yield lambda done: None


def tune(
    request: TuneRequest,
    *,
    tell: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> Report:
    """Train a drafter for a target and write it.

    Args:
        request: What is asked for.
        tell: Called with lines about what is going on.
        progress: How far long work is.

    Returns:
        What it has brought; the drafter's folder holds it, too.

    Raises:
        MTPError: A mistake of the user's: data, checkpoints, settings or places.
    """
    check_place(request.place, force=_may_replace(request))
    check_can_make(request.work_folder)
    folder = fetch(request.model, request.revision)
    plain, tokenizer = _load(request)
    params = SamplingParams(
        **plain.sampling_defaults.settings(**request.texts.sampling),
        seed=request.training.seed,
    )
    chosen = _chosen(request, plain, tokenizer)
    origin = begin_with(request, plain, folder)
    with workplace.workplace(
        request.work_folder,
        texts=texts_key(request, plain, params, chosen),
        training=training_key(request, origin),
        is_resumed=request.is_resumed,
    ) as place:
        if place.changed:
            tell(
                f"another {', '.join(place.changed)} than before: training begins anew "
                "on the texts that are there"
            )
        if not tokenizer.has_chat_template:
            tell(missing_template_note(tokenizer, "prompts go in as they are"))
        is_forced = _may_replace(request)
        check_place(request.place, force=is_forced)  # it may have other settings now
        run = _Run(request, place, plain, params, origin, chosen, tell, progress)
        name = hub_id(request.model, folder) or folder.resolve().name
        drafter, report = run.run(name)
        run.write(drafter, report, force=is_forced)
        if not request.keeps_work:
            place.remove()
    return report


def _load(request: TuneRequest) -> tuple[Pair, Any]:
    """The target as it runs, and its tokenizer."""
    model, tokenizer = load(
        request.model,
        speculative_decoding=False,
        adapter_path=request.adapter_path,
        revision=request.revision,
        trust_remote_code=request.trust_remote_code,
    )[:2]
    return pair_of(model), tokenizer


@dataclass(frozen=True)
class _Run:
    """The stages of one run."""

    request: TuneRequest
    place: Workplace
    plain: Pair
    params: SamplingParams
    origin: Origin
    chosen: Chosen
    tell: Callable[[str], None]
    progress: Progress

    def run(self, name: str) -> tuple[Drafter, Report]:
        """Go through the stages that are still to do.

        Args:
            name: What the target is called.

        Returns:
            The trained drafter, and what it has brought.
        """
        material = self._material()
        before = self._measured("before", self.origin.drafter)
        drafter, history = self._trained(material)
        after = self._measured("after", drafter)
        names = [*material.train, *material.judged]
        target = text_model(self.plain.target)
        return drafter, Report(
            target=name,
            drafter=self.origin.name,
            before=before,
            after=after,
            history=tuple(history),
            settings=self._settings(),
            minutes=self.place.notes["minutes"],
            peak_memory_bytes=self.place.notes["peak_memory_bytes"],
            records_bytes=material.records.num_bytes(names),
            prediction=predict(
                before.overall.reached,
                after.overall.reached,
                family=family_of(vars(target.args)),
                prior=self.plain.prior(1, 0),
                bits=_bits(target),
            ),
            machine=describe_machine(str(mx.default_device()), *self.request.hardware),
            command=self.request.command,
            usage=usage(self.request),
        )

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """A part of the work whose time and memory the report tells."""
        with self.place.stage(name):
            yield
            self._note_memory(mx.get_peak_memory())

    def _note_memory(self, num_bytes: int) -> None:
        """Keep the most that was held at a time, also before the run went on."""
        before = self.place.notes.get("peak_memory_bytes", 0)
        self.place.notes["peak_memory_bytes"] = max(before, num_bytes)

    def _settings(self) -> dict[str, Any]:
        """What decides the result beside models and data."""
        texts, training = self.request.texts, self.request.training
        used = {name: getattr(self.params, name) for name in texts.sampling}
        return {
            "data": [Path(path).name for path in self.request.data],
            "data_sha256": self.chosen.digest,
            "adapters": self.request.adapter_path is not None,
            "revision": self.request.revision,
            **asdict(texts),
            **used,
            **training.to_dict(),
        }

    def write(self, drafter: Drafter, report: Report, *, force: bool) -> None:
        """Write the drafter's folder.

        Args:
            drafter: The trained one.
            report: What stands in it.
            force: Whether a drafter that stands there may be replaced.
        """
        write_drafter(
            self.request.place,
            drafter,
            self.origin.config,
            training={**report.to_dict(), "run": self.place.notes["run"]},
            generation_config=self.origin.generation_config,
            dtype=self.origin.dtype,
            force=force,
            add=lambda inside: self._write_report(inside, report),
        )
        if self.origin.config.get("quantization"):
            self.tell(
                "the drafter was quantized and the new one is not: "
                "mlx_gemma_mtp.convert --draft-model quantizes it"
            )

    def _write_report(self, folder: Path, report: Report) -> None:
        for line in write_report(folder, report, name=self.request.place.name):
            self.tell(line)

    def _material(self) -> Material:
        """Texts and records."""
        settings, target = self.request.texts, Target(self.plain.target)
        records = Records(self.place.records)
        records.clear_scratch()
        writings = [
            Writing(documents, self.place.records, prefix, self.params, settings)
            for prefix, documents in (
                ("train", self.chosen.train),
                ("judge", self.chosen.judged),
            )
        ]
        num_bytes = sum(
            record_bytes(
                target,
                self.params,
                num_tokens=len(document.prompt) + num_places,
                num_places=num_places,
            )
            for writing in writings
            for document in writing.missing
            for num_places in [len(document.rest) or settings.max_tokens]
        )
        check_free_space(self.place.records, num_bytes + self._checkpoint_bytes())
        self.tell(self.chosen.amount)
        self.tell(
            f"records that are still to write take up to {size(num_bytes)} in "
            f"{self.place.folder}"
        )
        if self.chosen.is_judge_reported:
            self.tell(
                "little text is held out: the report is on the texts that choose the "
                "weights, too"
            )
        parts = []
        for writing in writings:
            what = f"texts to {writing.prefix}"
            with (
                self._stage("text"),
                self.progress(what, len(writing.documents)) as done,
            ):
                parts.append(write_all(writing, self.plain, done))
        if not all(parts):
            raise DataError(
                "the target must continue the data's prompts: got ends at once. Check "
                "the prompts and the chat template."
            )
        return Material(records, *parts)

    def _checkpoint_bytes(self) -> int:
        """What progress takes on disk: weights, the best, two of Adam's; twice.

        An old checkpoint is there until the new one is whole.
        """
        numbers = sum(
            array.size for _, array in named_arrays([dequantized(self.origin.drafter)])
        )
        there = self.place.checkpoint
        return 2 * 4 * 4 * numbers - (there.stat().st_size if there.exists() else 0)

    def _measured(self, when: str, drafter: Drafter) -> Measured:
        """The engine's acceptance with a drafter, measured once."""
        notes = self.place.notes
        if when not in notes:
            pair = Pair(
                self.plain.target, drafter, eos_token_ids=self.plain.eos_token_ids
            )
            with self._stage("measuring"):
                found = measure(
                    pair,
                    self.chosen.reported,
                    self.params,
                    num_draft_tokens=self.request.training.num_draft_tokens,
                    max_tokens=self.request.texts.max_tokens,
                    num_rows=self.request.texts.num_rows,
                    step_size=self.request.texts.step_size,
                )
            notes[when] = found.to_dict()
            self.place.save()
        return Measured.from_dict(notes[when])

    def _trained(self, material: Material) -> tuple[Drafter, list[Point]]:
        """The trained drafter in its own type, and how it came about."""
        settings = self.request.training
        drafter = dequantized(self.origin.drafter)
        if settings.lora_rank is None:
            trainable(drafter)
        else:
            add_adapters(
                drafter,
                rank=settings.lora_rank,
                scale=_LORA_SCALE,
                seed=settings.seed,
            )
        head = drafter.masked_embedding
        target = Target(self.plain.target)
        trainer = Trainer(
            drafter,
            material,
            objective=Objective(
                settings.num_draft_tokens,
                self.params.temp,
                None if head is None else head.clusters_of_tokens(),
            ),
            cutter=Cutter(
                target.layout,
                target.embed,
                settings.num_draft_tokens,
                settings.num_places
                or places_in_memory(drafter, settings.num_draft_tokens),
                _computing_type(target),
            ),
            settings=settings,
            checkpoint=self.place.checkpoint,
            on_point=lambda point: self.tell(_line(point)),
        )
        with self._stage("training"):
            trainer.train()
        # Its own count has what killed processes have spent.
        self.place.notes["minutes"]["training"] = trainer.progress.seconds / 60
        if not trainer.progress.best_step:
            self.tell("no step was better on held-out text: the drafter is as it was")
        fuse_adapters(drafter)
        drafter.set_dtype(self.origin.dtype)
        mx.eval(drafter.parameters())
        return drafter, trainer.progress.history


def _chosen(request: TuneRequest, plain: Pair, tokenizer: Any) -> Chosen:
    """The documents, after all of the data was read and checked."""
    settings = request.texts
    lengths = Lengths(
        settings.prompt_tokens,
        settings.max_tokens,
        text_model(plain.target).args.max_position_embeddings,
    )
    reader = DocumentReader(
        tokenizer,
        lengths,
        generate=settings.generate,
        chat_template_config=settings.chat_template_config,
    )
    held_out = reader.read(request.held_out) if request.held_out else None
    return choose(reader.read(request.data), held_out, settings, request.training.seed)


def _may_replace(request: TuneRequest) -> bool:
    """Whether a drafter at the place of the new one may go.

    A run that was cut off after all its work may put the same folder there again.
    """
    return request.is_forced or (
        request.is_resumed
        and workplace.has_written(request.work_folder, _training_of(request.place))
    )


def _training_of(folder: Path) -> Mapping[str, Any]:
    """What a drafter's folder says of its training; nothing where there is none."""
    path = folder / TRAINING_NAME
    return read_json(path) if path.is_file() else {}


def _bits(target: gemma4_text.Model) -> int:
    """Bits of most of the target's weights."""
    packed = [m for m in target.modules() if isinstance(m, nn.QuantizedLinear)]
    return Counter(m.bits for m in packed).most_common(1)[0][0] if packed else 16


def _computing_type(target: Target) -> mx.Dtype:
    """The type that training computes in: the CPU is slow in all but float32."""
    return mx.float32 if mx.default_device() == mx.cpu else target.layout.dtype


def _line(point: Point) -> str:
    return (
        f"step {point.step:,}: {point.minutes:.1f} minutes, loss {point.loss:.4f}, "
        f"acceptance length at every place {point.acceptance_length:.3f}"
    )
