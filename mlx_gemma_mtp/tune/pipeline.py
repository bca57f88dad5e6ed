"""A tuning from end to end: text, records, training, report, folder.

A run that was cut off goes on from the last group of records or the last checkpoint,
and ends with the same drafter.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import gemma4_text

from ..checkpoints.checkpoint import TRAINING_NAME, open_checkpoint, read_json
from ..checkpoints.find_drafter import find_drafter
from ..checkpoints.hub import fetch, hub_id
from ..checkpoints.staging import check_can_make, check_free_space, check_place
from ..checkpoints.template_files import missing_template_note
from ..checkpoints.weights import load_drafter
from ..cli.tables import size
from ..errors import CheckpointError, DataError, PairingError
from ..machine import describe_machine
from ..models.compatibility import check_fit
from ..models.drafter import Drafter
from ..models.families import family_of
from ..models.target import Target, text_model
from ..pair.load import load
from ..pair.pair import Pair, named_arrays, pair_of
from ..sampling.params import SamplingParams
from .data.documents import DocumentReader, Lengths
from .fresh import fresh_drafter
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
from .training.unrolling import Cutter

_LORA_SCALE = 20.0  # mlx-lm's
# Of what the activations of a chunk of places may take, see ``places_in_memory``.
_ACTIVATION_BYTES = 1 << 30
_MOST_PLACES = 256
_DIGEST_BYTES = 1 << 24  # of an array, looked at together

# Called with what is being done and out of how many; gives a function to call with how
# many are done.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Tell nobody how far work is."""
    yield lambda done: None


@dataclass(frozen=True)
class Origin:
    """The drafter that training begins with.

    Attributes:
        drafter: As decoding has it, maybe quantized.
        config: Its ``config.json``.
        generation_config: Its ``generation_config.json``; empty where it has none.
        name: Its Hub id or its folder's name; None for random weights.
        dtype: The type of the new drafter's weights.
    """

    drafter: Drafter
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    name: str | None
    dtype: mx.Dtype = mx.bfloat16


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
    origin = _origin(request, plain, folder)
    with workplace.workplace(
        request.work_folder,
        texts=_texts_key(request, plain, params, chosen),
        training=_training_key(request, origin),
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
        report = run.report(name)
        run.write(report, force=is_forced)
        if not request.keeps_work:
            place.remove()
    return report


def load_plain(request: TuneRequest) -> Pair:
    """The target of a request, once more."""
    return _load(request)[0]


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


@dataclass
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

    def report(self, name: str) -> Report:
        """Go through the stages that are still to do.

        Args:
            name: What the target is called.
        """
        material = self._material()
        before = self._measured("before", self.origin.drafter)
        self.drafter, history = self._trained(material)
        after = self._measured("after", self.drafter)
        names = [*material.train, *material.judged]
        target = text_model(self.plain.target)
        return Report(
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

    def write(self, report: Report, *, force: bool) -> None:
        """Write the drafter's folder.

        Args:
            report: What stands in it.
            force: Whether a drafter that stands there may be replaced.
        """
        write_drafter(
            self.request.place,
            self.drafter,
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
        load_again = partial(load_plain, self.request)
        for writing in writings:
            what = f"texts to {writing.prefix}"
            with (
                self._stage("text"),
                self.progress(what, len(writing.documents)) as done,
            ):
                written = write_all(writing, self.plain, load_again, done)
                self._note_memory(written.peak_memory_bytes)
                parts.append(written.names)
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
                settings.loss,
                settings.num_draft_tokens,
                self.params.temp,
                settings.least_reach,
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


def places_in_memory(drafter: Drafter, num_draft_tokens: int) -> int:
    """How many places of a text may have their activations in memory together.

    Logits are the most of them: each step's, with their softmax and their gradient; of
    a centroid head the embeddings of the candidates, which every place gathers.
    """
    text = drafter.config.text_config
    head = drafter.masked_embedding
    if head is None:
        numbers = 3 * text["vocab_size"]
    else:
        candidates = head.top_k * text["vocab_size"] // head.num_centroids
        numbers = 2 * candidates * text["hidden_size"]
    most = _ACTIVATION_BYTES // (4 * numbers * num_draft_tokens)
    return max(1, min(most, _MOST_PLACES))


def _origin(request: TuneRequest, plain: Pair, folder: Path) -> Origin:
    """The drafter to begin with.

    Raises:
        PairingError: There is none, or it does not fit.
    """
    if request.is_from_scratch:
        drafter, config = fresh_drafter(plain.target, seed=request.training.seed)
        return Origin(drafter, config, {}, None)
    if request.draft_model is not None:
        return _given(request.draft_model, plain)
    try:
        choice = find_drafter(request.model, folder)
        if choice.path_or_id is None:
            raise PairingError(choice.reason)
        return _given(choice.path_or_id, plain)
    except (CheckpointError, PairingError) as error:
        # Nobody asked for the one that was found.
        raise type(error)(f"{error} Or begin --from-scratch.") from error


def _given(named: str | Path, plain: Pair) -> Origin:
    """A drafter that there is, to begin with."""
    place = fetch(named)
    drafter = load_drafter(place)
    check_fit(plain.target, drafter)
    checkpoint = open_checkpoint(place)
    return Origin(
        drafter,
        checkpoint.config,
        checkpoint.generation_config,
        hub_id(named, place) or place.resolve().name,
        drafter.model.norm.weight.dtype,
    )


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


def _texts_key(
    request: TuneRequest, plain: Pair, params: SamplingParams, chosen: Chosen
) -> workplace.Key:
    """What decides the records, by name."""
    texts = asdict(request.texts)
    del texts["num_processes"]  # a text is the same whoever writes it
    used = {name: getattr(params, name) for name in (*request.texts.sampling, "seed")}
    return {
        "data": chosen.digest,
        "target": weights_digest(plain.target),
        **texts,
        **used,
        "adapters": _adapter_settings(request.adapter_path),
        "ends": sorted(plain.eos_token_ids),
        "package version": version("mlx_gemma_mtp"),
    }


def _training_key(request: TuneRequest, origin: Origin) -> workplace.Key:
    """What decides the training beside the records, by name."""
    training = request.training.to_dict()
    del training["save_every"]
    return {
        "drafter": weights_digest(origin.drafter),
        "device": str(mx.default_device()),
        **training,
    }


def _adapter_settings(adapter_path: str | None) -> Mapping[str, Any] | None:
    """What adapters beside their arrays decide, such as their scale."""
    path = None if adapter_path is None else Path(adapter_path) / "adapter_config.json"
    return None if path is None or not path.is_file() else read_json(path)


def weights_digest(module: nn.Module) -> str:
    """A text that tells weights apart, by their shapes, types and sums."""
    found = hashlib.sha256()
    for name, array in named_arrays([module]):
        found.update(f"{name} {array.shape} {array.dtype}\n".encode())
        flat = array.reshape(-1)
        size = _DIGEST_BYTES // array.dtype.size
        for start in range(0, flat.size, size):
            block = mx.view(flat[start : start + size], mx.uint8)
            words = block.astype(mx.uint32)
            places = mx.arange(1, words.size + 1, dtype=mx.uint32)
            sums = mx.stack([words.sum(), (words * places).sum()])
            found.update(np.array(sums).tobytes())
    return found.hexdigest()


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
