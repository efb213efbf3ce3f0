"""text-generation: texts that go on from prompts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from modernbert.auto import AutoModelForCausalLM
from modernbert.decoding.decoders import decoder_of
from modernbert.decoding.loops import Generation
from modernbert.decoding.options import GenerationOptions
from modernbert.decoding.text import TextPieces
from modernbert.errors import InputError, shown
from modernbert.models.decoder import ModernBertDecoderForCausalLM
from modernbert.pipelines.base import Job, Pipeline, Row
from modernbert.pipelines.checks import check_switch

logger = logging.getLogger(__name__)

_GENERATION = tuple(field.name for field in dataclasses.fields(GenerationOptions))
_OWN = ("return_full_text", "return_tensors", "stop_sequence", "seed", "add_special_tokens")
_NEW_TOKENS, _TEMPERATURE = 256, 0.7  # where nothing else is said, as in transformers


class _Prompt(NamedTuple):
    """What is known of a row: how many tokens each of its texts may get, and how many texts there are at a time."""

    limit: int
    texts: int


class TextGenerationPipeline(Pipeline):
    """Goes on with prompts.

    A call takes a text, a list of texts or an iterable of them, and the options of `GenerationOptions`, the usual ones
    being `max_new_tokens`, `do_sample`, `temperature`, `num_return_sequences` and `stop_strings` (or `stop_sequence`).
    If nothing is given it samples at a temperature of 0.7, up to 256 tokens and the end of the model's context. `seed`
    makes that repeatable: each input draws from a stream of its own, by the seed and its number, so that its text does
    not depend on the others. `return_full_text=False` leaves the prompt out, `return_tensors=True` gives ids instead
    of text, and `add_special_tokens=False` gives the prompt to the model without any.

    For each text it gives a list of `num_return_sequences` {"generated_text"} or {"generated_token_ids"}.
    """

    task = "text-generation"
    auto_model = AutoModelForCausalLM
    architecture = "decoder"
    needs = "a causal language model, which is a decoder"
    options = (*_GENERATION, *_OWN)

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        if not isinstance(model, ModernBertDecoderForCausalLM):
            raise InputError(f"text-generation needs a causal language model; this is a {type(model).__name__}")
        super().__init__(model, tokenizer, **options)
        ids = tokenizer("a").input_ids
        ends = model.config.eos_token_id
        if ids and ids[-1] in (ends if isinstance(ends, list) else [ends]):
            logger.warning("this tokenizer ends a prompt with %s, which ends texts", shown(tokenizer.decode([ids[-1]])))

    def settle(self, settings: dict[str, Any]) -> dict[str, Any]:
        """`GenerationOptions`, and the task's own options."""
        own = {name: settings.get(name) for name in _OWN}
        given = {k: v for k, v in settings.items() if k in _GENERATION and v is not None}
        own["return_tensors"] = check_switch("return_tensors", own["return_tensors"])
        for name in ("return_full_text", "add_special_tokens"):
            if own[name] is not None:
                own[name] = check_switch(name, own[name])
        if own["stop_sequence"] is not None:
            if "stop_strings" in given:
                raise InputError("stop_sequence and stop_strings say the same; give one of them")
            given["stop_strings"] = own["stop_sequence"]
        if own["return_full_text"] is not None and own["return_tensors"]:
            raise InputError("return_full_text is for text, and return_tensors gives ids; give one of them")
        seed = own["seed"]
        if seed is None:
            seed = int(torch.randint(2**31, ()))  # PyTorch's own seed decides
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise InputError(f"seed is {shown(seed)}; it must be a whole number from 0 to {2**32 - 1}")
        defaults: dict[str, Any] = {}
        if "do_sample" not in given and "num_beams" not in given:
            defaults["do_sample"] = True
        if given.get("do_sample", defaults.get("do_sample")) is True:
            defaults["temperature"] = _TEMPERATURE
        base = self.model.generation_defaults(**defaults)
        options = GenerationOptions.make({"do_sample": base.get("do_sample"), **given}, base)
        return {**own, "options": options, "seed": seed}

    def prepare(self, items: list[Any], settings: dict[str, Any]) -> list[Job]:
        """One row a prompt."""
        options: GenerationOptions = settings["options"]
        special = settings["add_special_tokens"] is not False
        texts = max(options.num_beams, options.num_return_sequences)
        jobs = []
        for text, encoding in zip(items, self.tokenize(items, add_special_tokens=special), strict=True):
            length = len(encoding.ids)
            if options.max_length is None and options.max_new_tokens is None:
                limit = max(1, min(max(_NEW_TOKENS, options.min_new_tokens), self.context - length))
            else:
                limit = options.new_tokens(length)
                self.model.warn_of_length(length + limit)
            jobs.append(Job([Row(encoding.ids, _Prompt(limit, texts))], text))
        return jobs

    def weight(self, row: Row) -> int:
        """Tokens of the prompt and of what may follow, of all texts that are followed at a time."""
        return int(row.extra.texts) * (len(row.ids) + int(row.extra.limit))

    def run(self, rows: list[Row], settings: dict[str, Any]) -> Sequence[Any]:
        """New ids of each row's texts."""
        options: GenerationOptions = settings["options"]
        copies = options.num_return_sequences
        generators: Any = [
            self._generator(settings["seed"], row.number, copy) for row in rows for copy in range(copies)
        ]
        if options.num_beams > 1:
            generators = generators[0]
            if options.do_sample and len(rows) > 1:  # one generator draws for one prompt
                return [self.run([row], settings)[0] for row in rows]
        prompts, limits = [list(row.ids) for row in rows], [row.extra.limit for row in rows]
        new = Generation(decoder_of(self.model, prompts), limits, options, generators, self.tokenizer).new_ids()
        return [new[i : i + copies] for i in range(0, len(new), copies)]

    def _generator(self, seed: int, number: int, copy: int) -> torch.Generator:
        # Distinct for all numbers below two million and copies below a thousand.
        return torch.Generator(self.model.device).manual_seed(seed + number * 1_000_003 * 1009 + copy * 1_000_003)

    def finish(self, job: Job, settings: dict[str, Any]) -> Any:
        """One dict a text."""
        prompt = job.rows[0].ids
        answers = []
        for ids in job.results[0]:
            if settings["return_tensors"]:
                answers.append({"generated_token_ids": [*prompt, *ids]})
                continue
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if settings["return_full_text"] is not False:
                text = job.context + text
            answers.append({"generated_text": text})
        return answers

    def can_stream(self, **options: Any) -> bool:
        """Whether `pieces` can serve these options: one text, no beams, text in the place of ids."""
        settings = self.settle({**self.defaults, **self._checked(options)})
        chosen: GenerationOptions = settings["options"]
        return max(chosen.num_beams, chosen.num_return_sequences) == 1 and not settings["return_tensors"]

    def pieces(self, text: str, number: int = 0, **options: Any) -> Iterator[str]:
        """Go on with one prompt, as an iterator of pieces of the continuation that never cut a character.

        Args:
            text: the prompt.
            number: of the input, where this is one of several; the same text as in a call comes of the same number.
            options: as those of a call; one text, and no beams.

        Raises:
            InputError: the prompt or an option cannot be served.
        """
        if not self.can_stream(**options):
            raise InputError("a stream goes on with one text, without beams, and gives text")
        settings = self.settle({**self.defaults, **self._checked(options)})
        chosen: GenerationOptions = settings["options"]
        (job,) = self.prepare([text], settings)
        (row,) = job.rows
        generator = self._generator(settings["seed"], number, 0)
        decoder, limits = decoder_of(self.model, [list(row.ids)]), [row.extra.limit]
        generation = Generation(decoder, limits, chosen, generator, self.tokenizer)
        return TextPieces(self.tokenizer).of(generation.tokens())
