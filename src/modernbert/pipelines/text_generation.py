"""text-generation: continuations of prompts."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch

from modernbert.auto import AutoModelForCausalLM
from modernbert.checks import check_text
from modernbert.decoding.decoders import decoder_of
from modernbert.decoding.loops import Generation
from modernbert.decoding.ongoing import Ongoing, OngoingSearch
from modernbert.decoding.options import GenerationOptions, has_no_meaning
from modernbert.decoding.processors import handed_over
from modernbert.decoding.speculation import speculation
from modernbert.decoding.text import TextPieces
from modernbert.errors import InputError, shown
from modernbert.models.decoder import ModernBertDecoderForCausalLM
from modernbert.pipelines.base import Job, Pipeline, Row
from modernbert.pipelines.options import ContinuationOptions, TextGenerationOptions

logger = logging.getLogger(__name__)

_NEW_TOKENS, _TEMPERATURE = 256, 0.7  # by default, as in transformers


@dataclasses.dataclass
class Prompt(Row):
    """A prompt, how many tokens each of its texts may get, and how many texts there are at a time."""

    limit: int
    texts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedOptions(ContinuationOptions):
    """Options with the model's own defaults."""

    generation: GenerationOptions
    seed: int


class TextGenerationPipeline(Pipeline[ResolvedOptions, Prompt, list[list[int]]]):
    """Continues prompts.

    A call takes a text, a list of texts or an iterable of them. By default it samples at a temperature of 0.7, up to
    256 tokens and the end of the model's context; `seed` makes that repeatable.

    For each text it gives a list of `num_return_sequences` {"generated_text"} or {"generated_token_ids"}.
    """

    task = "text-generation"
    options = TextGenerationOptions
    auto_model = AutoModelForCausalLM
    models = (ModernBertDecoderForCausalLM,)
    needs = "a causal language model, which is a decoder"
    architecture = "decoder"

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(model, tokenizer, **self._meant(options))
        ids = tokenizer("a").input_ids
        ends = model.config.eos_token_id
        if ids and ids[-1] in (ends if isinstance(ends, list) else [ends]):
            logger.warning("this tokenizer ends a prompt with %s, which ends texts", shown(tokenizer.decode([ids[-1]])))

    def given(self, options: dict[str, Any]) -> Any:
        """See the base; what `generate` takes without effect or refuses is taken and refused here, too."""
        return super().given(self._meant(options))

    @staticmethod
    def _meant(options: dict[str, Any]) -> dict[str, Any]:
        unused = {
            name
            for name, value in options.items()
            if name == "use_cache" or (name != "trust_remote_code" and has_no_meaning(name, value))
        }
        return {name: value for name, value in options.items() if name not in unused}

    def resolve(self, options: ContinuationOptions) -> ResolvedOptions:
        """`GenerationOptions` over the model's own, and a seed."""
        own = {field.name: getattr(options, field.name) for field in dataclasses.fields(ContinuationOptions)}
        given = {name: value for name, value in vars(options).items() if name not in own and value is not None}
        if options.stop_sequence is not None:
            if "stop_strings" in given:
                raise InputError("stop_sequence and stop_strings say the same; give one of them")
            given["stop_strings"] = options.stop_sequence
        if options.return_full_text is not None and options.return_tensors:
            raise InputError("return_full_text is for text, and return_tensors gives ids; give one of them")
        seed = options.seed
        if seed is None:
            seed = int(torch.randint(2**31, ()))  # PyTorch's own seed decides
        defaults: dict[str, Any] = {}
        if "do_sample" not in given and "num_beams" not in given:
            defaults["do_sample"] = True
        if given.get("do_sample", defaults.get("do_sample")) is True:
            defaults["temperature"] = _TEMPERATURE
        given, base = self.model.layered(given, options.generation_config, **defaults)
        generation = GenerationOptions.make({"do_sample": base.get("do_sample"), **given}, base)
        return ResolvedOptions(**{**own, "generation": generation, "seed": seed})

    def prepare(self, items: list[Any], options: ResolvedOptions) -> list[list[Prompt]]:
        chosen = options.generation
        texts = max(chosen.num_beams, chosen.num_return_sequences)
        special = options.add_special_tokens is not False
        rows = []
        prompts = [options.prefix + check_text(item, "a text") for item in items] if options.prefix else items
        for encoding in self.tokenize(prompts, add_special_tokens=special, truncation=options.truncation):
            length = len(encoding.ids)
            if chosen.max_length is None and chosen.max_new_tokens is None:
                limit = max(1, min(max(_NEW_TOKENS, chosen.min_new_tokens), self.context - length))
            else:
                limit = chosen.new_tokens(length)
                self.model.warn_of_length(length + limit)
            rows.append([Prompt(encoding.ids, limit, texts)])
        return rows

    def weight(self, row: Prompt) -> int:
        """Tokens of the prompt and of what may follow, of all texts that are followed at a time."""
        return row.texts * (len(row.ids) + row.limit)

    def run(self, rows: list[Prompt], options: ResolvedOptions) -> list[list[list[int]]]:
        chosen = options.generation
        copies = chosen.num_return_sequences
        generators: Any = [self._generator(options.seed, row.number, copy) for row in rows for copy in range(copies)]
        if chosen.num_beams > 1:
            generators = generators[0]
            if chosen.do_sample and len(rows) > 1:  # one generator draws for one prompt
                return [self.run([row], options)[0] for row in rows]
        generation = self._generation(rows, options, generators)
        if options.streamer is None:
            new = generation.new_ids()
        elif len(rows) * copies > 1 or chosen.num_beams > 1:
            raise InputError(f"streamer takes one text without beams; there are {len(rows) * copies}")
        else:
            options.streamer.put(torch.tensor([rows[0].ids]))
            for token in generation.tokens():
                options.streamer.put(torch.tensor([token]))
            options.streamer.end()
            new = [history.new for history in generation.texts]
        return [new[i : i + copies] for i in range(0, len(new), copies)]

    def _generation(self, rows: list[Prompt], options: ResolvedOptions, generators: Any) -> Generation:
        chosen, ids = options.generation, [list(row.ids) for row in rows]
        pad = next(iter(chosen.eos_token_id), 0) if chosen.pad_token_id is None else chosen.pad_token_id
        handed = handed_over(
            options.logits_processor, options.stopping_criteria, options.prefix_allowed_tokens_fn,
            without=[row[-1:] for row in ids], pad=pad,
        )  # fmt: skip
        limits = [row.limit for row in rows]
        decoder = decoder_of(self.model, ids, speculate=speculation(self.model, chosen, options.assistant_model))
        return Generation(decoder, limits, chosen, generators, self.tokenizer, handed)

    def ongoing(self, row: Prompt, options: ResolvedOptions, copy: int = 0) -> Ongoing | OngoingSearch:
        """A prompt's text for a running batch, or all its texts by a beam search: the same tokens as in a call."""
        generator = self._generator(options.seed, row.number, copy)
        if options.generation.num_beams > 1:
            begin = functools.partial(self._generation, [row], options, generator)
            return OngoingSearch(row.ids, row.limit, options.generation, begin)
        return Ongoing(row.ids, row.limit, options.generation, generator, self.tokenizer)

    def _generator(self, seed: int, number: int, copy: int) -> torch.Generator:
        # Distinct for all numbers below two million and copies below a thousand.
        return torch.Generator(self.model.device).manual_seed(seed + number * 1_000_003 * 1009 + copy * 1_000_003)

    def finish(self, job: Job[Prompt, list[list[int]]], options: ResolvedOptions) -> list[dict[str, Any]]:
        if options.return_tensors:
            return [{"generated_token_ids": [*job.rows[0].ids, *ids]} for ids in job.results[0]]
        before = "" if options.return_full_text is False else job.item
        clean = options.clean_up_tokenization_spaces
        texts = [self.tokenizer.decode(ids, True, clean) for ids in job.results[0]]
        return [{"generated_text": before + text} for text in texts]

    def can_stream(self, **options: Any) -> bool:
        """Whether `pieces` can serve these options: one text, no beams, text and no ids."""
        return self._streams(self.resolve(self.given(options)))

    def _streams(self, options: ResolvedOptions) -> bool:
        chosen = options.generation
        whole = options.return_tensors or options.clean_up_tokenization_spaces
        return max(chosen.num_beams, chosen.num_return_sequences) == 1 and not whole

    def pieces(self, text: str, number: int = 0, **options: Any) -> Iterator[str]:
        """Continue one prompt, as an iterator of pieces of the continuation that never cut a character.

        Args:
            text: the prompt.
            number: of the input, where this is one of several; the same text as in a call comes of the same number.
            options: as those of a call; one text, and no beams.

        Raises:
            InputError: the prompt or an option cannot be served.
        """
        resolved = self.resolve(self.given(options))
        if not self._streams(resolved):
            raise InputError("a stream continues one text, without beams, and gives text")
        (rows,) = self.prepare([text], resolved)
        generator = self._generator(resolved.seed, number, 0)
        return TextPieces(self.tokenizer).of(self._generation(rows, resolved, generator).tokens())
