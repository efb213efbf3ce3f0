"""`generate`: the door of text generation.

Shapes: B texts, S columns, T tokens of all texts together, M hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modernbert.config import Config
from modernbert.decoding.cache import DecoderCache
from modernbert.decoding.decoders import CachedDecoder, decoder_of
from modernbert.decoding.loops import Generation
from modernbert.decoding.options import GenerationOptions, shows_options
from modernbert.decoding.samplers import Generators
from modernbert.decoding.text import TextPieces
from modernbert.errors import InputError, listed
from modernbert.io.files import write_text
from modernbert.io.hub import Source
from modernbert.nn.inputs import check_tensors
from modernbert.nn.outputs import ModelOutput
from modernbert.nn.packing import PackedInputs, on_device

logger = logging.getLogger(__name__)

_DEFAULTS = "generation_config.json"
# Keys of such a file that say nothing about the text.
_SILENT = {
    "_from_model_config", "bos_token_id", "cache_implementation", "output_attentions", "output_hidden_states",
    "output_logits", "output_scores", "return_dict_in_generate", "transformers_version", "use_cache",
}  # fmt: skip


class GenerateOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Attributes:
        sequences: (texts, tokens) ids, prompts included, filled up with the padding id.
        sequences_scores: (texts,) of beam search: log-probabilities over lengths.
        scores: for each new token (texts, vocabulary), as it was chosen by; zeros for texts that were finished.
        logits: likewise, as the model gave them.
        past_key_values: the cache of all tokens but the last one of each text; None after a beam search.
    """

    sequences: Tensor | None
    sequences_scores: Tensor | None
    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None
    past_key_values: Any


class GenerationMixin:
    """`generate` and `stream`, for models that score the next token.

    Attributes:
        generation_config: defaults of the options, as a checkpoint's `generation_config.json` holds them.
    """

    generation_config: dict[str, Any]
    config: Any  # this and what follows are of the model that this is mixed into
    device: Any
    training: bool
    model: Any
    score: Any

    def read_more(self, source: Source) -> None:
        """Defaults of `generate`, where the checkpoint has them."""
        if source.find(_DEFAULTS) is not None:
            self.generation_config = source.read_json(_DEFAULTS)
            known = _SILENT | {field.name for field in dataclasses.fields(GenerationOptions)}
            others = [name for name, value in self.generation_config.items() if value is not None and name not in known]
            if others:
                logger.warning("%s names options that are not served: %s", _DEFAULTS, listed(sorted(others)))

    def save_more(self, folder: Path) -> None:
        """Write the defaults of `generate`, where there are any."""
        if self.generation_config:
            write_text(folder / _DEFAULTS, json.dumps(self.generation_config, indent=2, sort_keys=True) + "\n")
        else:
            (folder / _DEFAULTS).unlink(missing_ok=True)

    def score_next(self, inputs: PackedInputs, cache: DecoderCache | None) -> Tensor:
        """Scores (B, V), float32, of what follows each text that has tokens in the input; the cache gets those."""
        x_TM = self.model.encode(inputs, False, False, cache).last_TM
        ends = [end - 1 for start, end in inputs.packing.spans if end > start]
        if len(ends) < len(x_TM):
            x_TM = x_TM.index_select(0, on_device(ends, x_TM.device))
        scores_BV: Tensor = self.score(x_TM).float()
        return scores_BV

    @shows_options
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        tokenizer: Any = None,
        streamer: Any = None,
        use_cache: bool = True,
        past_key_values: DecoderCache | None = None,
        generator: Generators = None,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        output_logits: bool = False,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """Go on with prompts.

        Options that are not given are the checkpoint's `generation_config`, then those of `GenerationOptions`.

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
            options: of `GenerationOptions`, which says what each means; `token_type_ids` is accepted and ignored.

        Returns:
            Ids (B * num_return_sequences, S + new tokens): the prompts as they were given, the new tokens, and the
            padding id after the end of shorter texts. Or a `GenerateOutput`.

        Raises:
            InputError: an option is unknown or impossible, options contradict each other, or a prompt is empty.
        """
        options.pop("token_type_ids", None)
        chosen = GenerationOptions.make(options, self.generation_defaults())
        if (output_scores or output_logits) and not return_dict_in_generate:
            raise InputError("output_scores and output_logits are returned with return_dict_in_generate=True")
        if chosen.num_beams > 1 and (output_scores or output_logits):
            raise InputError("output_scores and output_logits are of decoding without beams; leave num_beams out")
        if not use_cache and past_key_values is not None:
            raise InputError("use_cache is False and past_key_values is given; leave one of them out")
        ids_BS, prompts = read_prompts(input_ids, attention_mask, chosen, self.config)
        copies = chosen.num_return_sequences
        texts = len(prompts) * copies
        if streamer is not None and (texts > 1 or chosen.num_beams > 1):
            raise InputError(f"streamer takes one text without beams; there are {texts}, and {chosen.num_beams} beams")
        if isinstance(generator, Sequence) and len(generator) != texts:
            raise InputError(f"generator holds {len(generator)}; give one, or one for each of {texts} texts")
        limit = self._limit(ids_BS, chosen)
        if isinstance(past_key_values, DecoderCache) and max(chosen.num_beams, copies) > 1:
            past_key_values = past_key_values.copy()
        decoder = decoder_of(self, prompts, use_cache, past_key_values, return_dict_in_generate)
        generation = Generation(decoder, [limit] * len(prompts), chosen, generator, tokenizer)
        output = GenerateOutput()
        if chosen.num_beams > 1:
            output.sequences_scores = torch.tensor(generation.beams())
        else:
            scores, logits = [], []
            with contextlib.ExitStack() as stack:
                if streamer is not None:
                    stack.callback(streamer.end)  # after an error too, so that it is ready for another text
                    streamer.put(torch.tensor(prompts))
                for step in generation.steps():
                    if streamer is not None:
                        streamer.put(torch.tensor(step.tokens))
                    if output_scores:
                        scores.append(step.of_all(step.scores_BV, texts))
                    if output_logits:
                        logits.append(step.of_all(step.logits_BV, texts))
            output.scores = tuple(scores) if output_scores else None
            output.logits = tuple(logits) if output_logits else None
        new = [history.new for history in generation.texts]
        width = max(map(len, new))
        if isinstance(decoder, CachedDecoder) and chosen.num_beams == 1:
            decoder.cache.columns = ids_BS.shape[1] + width - 1
            output.past_key_values = decoder.cache
        pad = chosen.pad_token_id if chosen.pad_token_id is not None else next(iter(chosen.eos_token_id), 0)
        filled = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in new], dtype=torch.int64)
        output.sequences = torch.cat([ids_BS.repeat_interleave(copies, 0), filled.to(ids_BS)], dim=1)
        return output if return_dict_in_generate else output.sequences

    @shows_options
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
            past_key_values, generator: see `generate`.
            options: of `GenerationOptions`, without beams.

        Raises:
            InputError: see `generate`; at once.
        """
        chosen = GenerationOptions.make(options, self.generation_defaults())
        ids_BS, prompts = read_prompts(input_ids, attention_mask, chosen, self.config)
        if len(prompts) * chosen.num_return_sequences > 1 or chosen.num_beams > 1:
            raise InputError("stream goes on with one text, without beams")
        limit = self._limit(ids_BS, chosen)
        decoder = decoder_of(self, prompts, cache=past_key_values)
        generation = Generation(decoder, [limit], chosen, generator, tokenizer)
        return TextPieces(tokenizer, skip_special_tokens).of(generation.tokens())

    def generation_defaults(self, **usual: Any) -> dict[str, Any]:
        """Options that are not given: from the configuration, then `usual` ones, then the checkpoint's own."""
        ids = {"eos_token_id": self.config.eos_token_id, "pad_token_id": self.config.pad_token_id}
        return {**ids, **usual, **self.generation_config}

    def warn_of_length(self, tokens: int) -> None:
        """Warn if a text may become longer than the model was trained for."""
        context = self.config.max_position_embeddings
        if tokens > context:
            logger.warning("up to %d tokens are asked for; the model was trained for texts of %d", tokens, context)

    def _limit(self, ids_BS: Tensor, options: GenerationOptions) -> int:
        limit = options.new_tokens(ids_BS.shape[1])
        self.warn_of_length(ids_BS.shape[1] + limit)
        return limit


def read_prompts(
    input_ids: Tensor | None, attention_mask: Tensor | None, options: GenerationOptions, config: Config
) -> tuple[Tensor, list[list[int]]]:
    """The prompts as they were given, (B, S), and the real tokens of each; raises `InputError` where they are wrong."""
    if input_ids is None:
        if config.bos_token_id is None:
            raise InputError("input_ids is not given, and the configuration has no bos_token_id to begin with")
        input_ids = torch.tensor([[config.bos_token_id]])
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
        raise InputError(f"attention_mask has shape {tuple(attention_mask.shape)}; it must be {tuple(input_ids.shape)}")
    given = zip(input_ids.tolist(), attention_mask.ne(0).tolist(), strict=True)
    prompts = [[i for i, real in zip(ids, mask, strict=True) if real] for ids, mask in given]
    if not prompts or not all(prompts):
        raise InputError("a prompt has no token; give at least one, such as bos_token_id")
    low, high = min(map(min, prompts)), max(map(max, prompts))
    if low < 0 or high >= config.vocab_size:
        raise InputError(
            f"input_ids holds {low if low < 0 else high}; the vocabulary has ids 0 to {config.vocab_size - 1}"
        )
    return input_ids.long(), prompts
