"""`generate`: the door of text generation.

Shapes: B texts, S columns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modernbert.decoding.cache import DecoderCache
from modernbert.decoding.decoders import CachedDecoder, UncachedDecoder
from modernbert.decoding.loops import Step, follow, search
from modernbert.decoding.options import GenerationOptions
from modernbert.decoding.samplers import Draw, History, compose
from modernbert.decoding.text import TextPieces, holds_stop
from modernbert.errors import InputError, listed
from modernbert.files import write_text
from modernbert.hub import Source
from modernbert.models.outputs import GenerateOutput
from modernbert.nn.inputs import check_tensors

logger = logging.getLogger(__name__)

_DEFAULTS = "generation_config.json"
# Keys of such a file that say nothing about the text.
_SILENT = {
    "_from_model_config", "bos_token_id", "cache_implementation", "output_attentions", "output_hidden_states",
    "output_logits", "output_scores", "return_dict_in_generate", "transformers_version", "use_cache",
}  # fmt: skip
Generators = torch.Generator | Sequence[torch.Generator] | None


class GenerationMixin:
    """`generate` and `stream`, for models that score the next token.

    Attributes:
        generation_config: defaults of the options, as a checkpoint's `generation_config.json` holds them.
    """

    config: Any  # of the model that this is mixed into
    generation_config: dict[str, Any]

    def read_more(self, source: Source) -> None:
        """Defaults of `generate`, where the checkpoint has them."""
        if source.find(_DEFAULTS) is not None:
            self.generation_config = source.read_json(_DEFAULTS)
            served = {field.name for field in dataclasses.fields(GenerationOptions)}
            others = [k for k, v in self.generation_config.items() if v is not None and k not in served | _SILENT]
            if others:
                logger.warning("%s names options that are not served: %s", _DEFAULTS, listed(sorted(others)))

    def save_more(self, folder: Path) -> None:
        """Write the defaults of `generate`, where there are any."""
        if self.generation_config:
            write_text(folder / _DEFAULTS, json.dumps(self.generation_config, indent=2, sort_keys=True) + "\n")
        else:
            (folder / _DEFAULTS).unlink(missing_ok=True)

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        num_beams: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | str | None = None,
        num_return_sequences: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        streamer: Any = None,
        use_cache: bool = True,
        past_key_values: DecoderCache | None = None,
        generator: Generators = None,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        output_logits: bool = False,
        **kwargs: Any,
    ) -> Tensor | GenerateOutput:
        """Go on with prompts.

        Options that are not given are the checkpoint's `generation_config`, then those of `GenerationOptions`, which
        says what each means.

        Args:
            input_ids: (B, S) prompts, padded on either side; None begins one text with the configuration's
                `bos_token_id`.
            attention_mask: (B, S), nonzero at real tokens; None takes the padding id for padding. Padding inside a
                prompt is left out of it.
            tokenizer: decodes for `stop_strings`, which need it.
            streamer: gets the prompt's ids and then each token by `put`, and `end` at the end, such as a
                `TextStreamer`; of one text, without beams.
            use_cache: False reads each text anew for every token.
            past_key_values: a `DecoderCache` of the prompts' beginnings, such as an earlier output's; it is gone on
                with, and then holds all tokens but the last one of each text. With several beams or sequences a
                prompt it is read and left as it is.
            generator: draws for the whole batch from one, or for each text from its own of a list (one a returned
                text); None takes PyTorch's global one.
            return_dict_in_generate: return a `GenerateOutput`.
            output_scores, output_logits: with that, keep the scores of every step.
            kwargs: `token_type_ids` is accepted and ignored.

        Returns:
            Ids (B * num_return_sequences, S + new tokens): the prompts as they were given, the new tokens, and the
            padding id after the end of shorter texts. Or a `GenerateOutput`.

        Raises:
            InputError: an option is unknown or impossible, options contradict each other, or a prompt is empty.
        """
        given = {
            "max_length": max_length,
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "no_repeat_ngram_size": no_repeat_ngram_size,
            "num_beams": num_beams,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
            "num_return_sequences": num_return_sequences,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "stop_strings": stop_strings,
        }
        kwargs.pop("token_type_ids", None)
        options = self._options({**given, **kwargs})
        if (output_scores or output_logits) and not return_dict_in_generate:
            raise InputError("output_scores and output_logits are returned with return_dict_in_generate=True")
        if options.num_beams > 1 and (output_scores or output_logits):
            raise InputError("output_scores and output_logits are of decoding without beams; leave num_beams out")
        if not use_cache and past_key_values is not None:
            raise InputError("use_cache is False and past_key_values is given; leave one of them out")
        ids_BS, prompts = self._prompts(input_ids, attention_mask, options)
        texts = len(prompts) * options.num_return_sequences
        if streamer is not None and (texts > 1 or options.num_beams > 1):
            raise InputError(f"streamer takes one text without beams; there are {texts}, and {options.num_beams} beams")
        if isinstance(generator, Sequence) and len(generator) != texts:
            raise InputError(f"generator holds {len(generator)}; give one, or one for each of {texts} texts")
        if options.num_beams > 1 and isinstance(generator, Sequence):
            raise InputError("generator is a list; a beam search draws from one generator")
        new_tokens = options.new_tokens(ids_BS.shape[1])
        self.warn_of_length(ids_BS.shape[1] + new_tokens)
        if isinstance(past_key_values, DecoderCache) and max(options.num_beams, options.num_return_sequences) > 1:
            past_key_values = past_key_values.copy()
        decoder = self._decoder(use_cache, past_key_values, return_dict_in_generate)
        limits = [new_tokens] * len(prompts)
        output = GenerateOutput()
        if options.num_beams > 1:
            assert not isinstance(generator, Sequence)
            best = self._search(decoder, prompts, limits, options, generator, tokenizer)
            continuations = [tokens for tokens, _ in best]
            output.sequences_scores = torch.tensor([score for _, score in best])
        else:
            kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
            continuations = [[] for _ in range(texts)]
            steps = self._steps(decoder, prompts, limits, options, generator, tokenizer)
            with contextlib.ExitStack() as stack:
                if streamer is not None:
                    stack.callback(streamer.end)  # after an error too, so that it is ready for another text
                    streamer.put(torch.tensor(prompts))
                for step in steps:
                    for text, token in zip(step.texts, step.tokens, strict=True):
                        continuations[text].append(token)
                    if streamer is not None:
                        streamer.put(torch.tensor(step.tokens))
                    for name, wanted, values in (
                        ("scores", output_scores, step.scores_BV),
                        ("logits", output_logits, step.logits_BV),
                    ):
                        if wanted:
                            whole = torch.zeros((texts, values.shape[1]), device=values.device)
                            rows = torch.tensor(step.texts, device=whole.device)
                            kept[name].append(whole.index_copy_(0, rows, values))
            output.scores = tuple(kept["scores"]) if output_scores else None
            output.logits = tuple(kept["logits"]) if output_logits else None
            if isinstance(decoder, CachedDecoder):
                decoder.cache.columns = ids_BS.shape[1] + max(map(len, continuations)) - 1
                output.past_key_values = decoder.cache
        pad = options.pad_token_id if options.pad_token_id is not None else next(iter(options.eos_token_id), 0)
        width = max(len(tokens) for tokens in continuations)
        new = torch.tensor([[*tokens, *[pad] * (width - len(tokens))] for tokens in continuations], dtype=torch.int64)
        before = ids_BS.repeat_interleave(options.num_return_sequences, 0)
        output.sequences = torch.cat([before, new.to(before)], dim=1)
        return output if return_dict_in_generate else output.sequences

    def continue_prompts(
        self,
        prompts: list[list[int]],
        limits: list[int],
        options: GenerationOptions,
        generator: Generators = None,
        tokenizer: Any = None,
    ) -> list[list[int]]:
        """Go on with prompts that are checked already; what `generate` does without its door.

        Args:
            prompts: ids of each.
            limits: how many new tokens each may get.
            options: how to generate.
            generator, tokenizer: as of `generate`.

        Returns:
            New ids, `num_return_sequences` texts a prompt, one after another.
        """
        decoder = self._decoder(True, None, False)
        if options.num_beams > 1:
            assert not isinstance(generator, Sequence)
            return [tokens for tokens, _ in self._search(decoder, prompts, limits, options, generator, tokenizer)]
        continuations: list[list[int]] = [[] for _ in range(len(prompts) * options.num_return_sequences)]
        for step in self._steps(decoder, prompts, limits, options, generator, tokenizer):
            for text, token in zip(step.texts, step.tokens, strict=True):
                continuations[text].append(token)
        return continuations

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        tokenizer: Any,
        skip_special_tokens: bool = True,
        past_key_values: DecoderCache | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Go on with one prompt, as an iterator of pieces of text that never cut a character.

        Args:
            input_ids: (1, S) the prompt.
            attention_mask: (1, S).
            tokenizer: decodes.
            skip_special_tokens: leave special tokens out.
            past_key_values, generator: as of `generate`.
            options: of `GenerationOptions`, without beams.

        Raises:
            InputError: as of `generate`, at once.
        """
        settled = self._options(options)
        ids_BS, prompts = self._prompts(input_ids, attention_mask, settled)
        if len(prompts) * settled.num_return_sequences > 1 or settled.num_beams > 1:
            raise InputError("stream goes on with one text, without beams")
        limit = settled.new_tokens(ids_BS.shape[1])
        self.warn_of_length(ids_BS.shape[1] + limit)
        steps = self.follow_prompt(prompts[0], limit, settled, generator, tokenizer, past_key_values)
        return TextPieces(tokenizer, skip_special_tokens).of(steps)

    def follow_prompt(
        self,
        prompt: list[int],
        limit: int,
        options: GenerationOptions,
        generator: torch.Generator | None = None,
        tokenizer: Any = None,
        past_key_values: DecoderCache | None = None,
    ) -> Iterator[int]:
        """New ids of one prompt that is checked already, as they come; arguments as of `continue_prompts`."""
        decoder = self._decoder(True, past_key_values, False)
        steps = self._steps(decoder, [prompt], [limit], options, generator, tokenizer)
        return (step.tokens[0] for step in steps)

    def _options(self, given: dict[str, Any]) -> GenerationOptions:
        return GenerationOptions.make(given, self.generation_defaults())

    def generation_defaults(self, **usual: Any) -> dict[str, Any]:
        """Options where a caller says nothing: those of the configuration, `usual` ones, the checkpoint's own."""
        ids = {"eos_token_id": self.config.eos_token_id, "pad_token_id": self.config.pad_token_id}
        return {**ids, **usual, **self.generation_config}

    def warn_of_length(self, tokens: int) -> None:
        """Say so where a text may become longer than the model was trained for."""
        context = self.config.max_position_embeddings
        if tokens > context:
            logger.warning("up to %d tokens are asked for; the model was trained for texts of %d", tokens, context)

    def _prompts(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, options: GenerationOptions
    ) -> tuple[Tensor, list[list[int]]]:
        """The prompts as they were given, (B, S), and the real tokens of each."""
        if input_ids is None:
            if self.config.bos_token_id is None:
                raise InputError("input_ids is not given, and the configuration has no bos_token_id to begin with")
            input_ids = torch.tensor([[self.config.bos_token_id]])
        check_tensors(input_ids=input_ids, attention_mask=attention_mask)
        if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise InputError(
                f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}; prompts are whole numbers "
                "of shape (batch, sequence)"
            )
        if attention_mask is None:
            pad, ends = options.pad_token_id, options.eos_token_id
            attention_mask = torch.ones_like(input_ids) if pad is None or pad in ends else input_ids.ne(pad)
        if attention_mask.shape != input_ids.shape:
            raise InputError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; it must be {tuple(input_ids.shape)}"
            )
        input_ids = input_ids.long()
        rows = zip(input_ids.tolist(), attention_mask.ne(0).tolist(), strict=True)
        prompts = [[i for i, real in zip(ids, mask, strict=True) if real] for ids, mask in rows]
        if not prompts or not all(prompts):
            raise InputError("a prompt has no token; give at least one, such as bos_token_id")
        low, high = min(map(min, prompts)), max(map(max, prompts))
        size = self.config.vocab_size
        if low < 0 or high >= size:
            raise InputError(f"input_ids holds {low if low < 0 else high}; the vocabulary has ids 0 to {size - 1}")
        return input_ids, prompts

    def _decoder(
        self, use_cache: bool, cache: DecoderCache | None, keep_texts: bool
    ) -> CachedDecoder | UncachedDecoder:
        model: Any = self
        if cache is not None and not isinstance(cache, DecoderCache):
            raise InputError(f"past_key_values is a {type(cache).__name__}; it must be a DecoderCache")
        if model.training:
            raise InputError("generation is for evaluation mode; call model.eval() first")
        if not use_cache:
            return UncachedDecoder(model)
        keep_texts = keep_texts or cache is not None
        return CachedDecoder(model, DecoderCache(model.config) if cache is None else cache, keep_texts)

    def _stop(self, options: GenerationOptions, tokenizer: Any) -> Any:
        """Whether a text is at its end."""
        if options.stop_strings and tokenizer is None:
            raise InputError("stop_strings need tokenizer=, which decodes what they are looked for in")
        ends, strings = set(options.eos_token_id), options.stop_strings

        def stop(history: History) -> bool:
            return history.ids[-1] in ends or (bool(strings) and holds_stop(tokenizer, strings, history.new))

        return stop

    def _steps(
        self,
        decoder: CachedDecoder | UncachedDecoder,
        prompts: list[list[int]],
        limits: list[int],
        options: GenerationOptions,
        generator: Generators,
        tokenizer: Any,
    ) -> Iterator[Step]:
        """Steps of decoding without beams; what is wrong with the arguments is said at once."""
        several = generator if isinstance(generator, Sequence) else [generator or torch.default_generator]
        if not all(isinstance(g, torch.Generator) for g in several):
            raise InputError(f"generator is a {type(generator).__name__}; give a torch.Generator or a list of them")
        decoder.check(prompts)
        texts = len(prompts) * options.num_return_sequences
        draw = Draw(texts, generator) if options.do_sample else None
        stop = self._stop(options, tokenizer)
        steps = follow(decoder, prompts, limits, options, compose(options), draw, stop)

        def inferred() -> Iterator[Step]:
            while True:
                with torch.inference_mode():  # not across a yield, where it would be the caller's too
                    step = next(steps, None)
                if step is None:
                    return
                yield step

        return inferred()

    def _search(
        self,
        decoder: CachedDecoder | UncachedDecoder,
        prompts: list[list[int]],
        limits: list[int],
        options: GenerationOptions,
        generator: torch.Generator | None,
        tokenizer: Any,
    ) -> list[tuple[list[int], float]]:
        """New ids of the best beams, and their scores."""
        stop = self._stop(options, tokenizer)
        with torch.inference_mode():
            found = search(decoder, prompts, limits, options, compose(options), generator, stop)
        return [(history.new, score) for history, score in itertools.chain.from_iterable(found)]
