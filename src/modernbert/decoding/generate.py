"""`generate`: the door of text generation.

Shapes: B texts, S columns, T tokens of all texts together, M hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modernbert.config import Config
from modernbert.decoding.cache import DecoderCache
from modernbert.decoding.config import FILE, GenerationConfig
from modernbert.decoding.decoders import CachedDecoder, decoder_of
from modernbert.decoding.exchange import read_cache
from modernbert.decoding.loops import Generation, Step
from modernbert.decoding.options import NO_EFFECT, REFUSED, GenerateOptions, GenerationOptions, shows_options
from modernbert.decoding.processors import handed_over
from modernbert.decoding.samplers import Generators
from modernbert.decoding.speculation import settling, speculation
from modernbert.decoding.states import States
from modernbert.decoding.text import TextPieces
from modernbert.errors import InputError, listed
from modernbert.io.hub import Source
from modernbert.nn.inputs import check_tensors
from modernbert.nn.outputs import ModelOutput
from modernbert.nn.packing import PackedInputs, on_device

logger = logging.getLogger(__name__)


class GenerateOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Steps are of new tokens; rows are texts, or in a beam search the beams of all prompts, one prompt after another.

    Attributes:
        sequences: (texts, tokens) ids, prompts included, filled up with the padding id.
        sequences_scores: (texts,) of beam search: log-probabilities over lengths.
        scores: for each step (rows, vocabulary), as tokens were chosen by; zeros for rows that were finished.
        logits: likewise, as the model gave them.
        beam_indices: (texts, steps) of beam search with scores: the row that each token goes on from, -1 after the end.
        attentions: for each step and layer (rows, heads, new columns, columns so far), zeros at padding.
        hidden_states: for each step, the embeddings and each layer's output (rows, new columns, hidden).
        past_key_values: the cache of all tokens but the last one of each text; None after a beam search.
    """

    sequences: Tensor | None
    sequences_scores: Tensor | None
    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None
    beam_indices: Tensor | None
    attentions: tuple[tuple[Tensor, ...], ...] | None
    hidden_states: tuple[tuple[Tensor, ...], ...] | None
    past_key_values: Any


class GenerationMixin:
    """`generate` and `stream`, for models that score the next token.

    Attributes:
        generation_config: defaults of the options, as a checkpoint's `generation_config.json` holds them.
    """

    _generation_config: GenerationConfig
    get_input_embeddings: Any  # this and what follows are of the model that this is mixed into
    config: Any
    device: Any
    dtype: Any
    training: bool
    model: Any
    score: Any

    @property
    def generation_config(self) -> GenerationConfig:
        """Defaults of the options; a mapping or another library's object may be set, too."""
        return self._generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self._generation_config = GenerationConfig.of(value, self.config)

    def read_more(self, source: Source) -> None:
        """Defaults of `generate`, where the checkpoint has them."""
        if source.find(FILE) is not None:
            self.generation_config = source.read_json(FILE)
            if others := self.generation_config.not_served:
                logger.warning("%s names options that are not served: %s", FILE, listed(others))

    def save_more(self, folder: Path) -> None:
        """Write the defaults of `generate`, where there are any."""
        if self.generation_config.to_diff_dict():
            self.generation_config.save_pretrained(folder)
        else:
            (folder / FILE).unlink(missing_ok=True)

    @property
    def goes_one_by_one(self) -> bool:
        """Whether several new tokens of a text can be scored as if each had come by itself, bit for bit."""
        return self.model.runner is not None and self.model.runner.goes_one_by_one

    def score_next(self, inputs: PackedInputs, cache: DecoderCache | None, every: bool = False) -> Tensor:
        """Scores (B, V), float32, of what follows each text that has tokens in the input; the cache gets those.

        With `every` of what follows each token.
        """
        x_TM = self.model.encode(inputs, False, False, cache).last_TM
        ends = [end - 1 for start, end in inputs.packing.spans if end > start]
        if len(ends) < len(x_TM) and not every:
            x_TM = x_TM.index_select(0, on_device(ends, x_TM.device))
        scores_BV: Tensor = self.score(x_TM).float()
        return scores_BV

    @shows_options(GenerateOptions)
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None,
        stopping_criteria: Sequence[Callable[..., Any]] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], Any] | None = None,
        inputs: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        tokenizer: Any = None,
        streamer: Any = None,
        past_key_values: Any = None,
        cache: Any = None,
        generator: Generators = None,
        assistant_model: Any = None,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """Go on with prompts.

        Options that are not given are those of `generation_config`, then the model's own `generation_config`, then
        those of `GenerateOptions`.

        Args:
            input_ids: (B, S) prompts, padded on either side; None begins one text with the configuration's
                `bos_token_id`.
            attention_mask: (B, S), nonzero at real tokens; None takes the padding id for padding. Padding inside a
                prompt is left out of it.
            generation_config: options of this call.
            logits_processor: callables that take ids and scores and return scores; they come before temperature and
                what else is for draws alone.
            stopping_criteria: callables that take ids and, with `output_scores`, scores, and say which texts end.
            prefix_allowed_tokens_fn: takes the number of a prompt and ids, returns the ids that may follow.
            inputs: another name of `input_ids`.
            inputs_embeds: (B, S, M) instead of the prompts' embeddings. Without `input_ids` the new tokens alone are
                returned.
            negative_prompt_ids, negative_prompt_attention_mask: (B, N) what stands before continuations instead of the
                prompts, for `guidance_scale`; None takes each prompt's last token.
            tokenizer: decodes for `stop_strings`, which need it.
            streamer: gets the prompt's ids and then each token by `put`, and `end` at the end, such as a
                `TextStreamer`; of one text, without beams.
            past_key_values: a `DecoderCache` of the prompts' beginnings, such as an earlier output's; it is gone on
                with, and then holds all tokens but the last one of each text. With several beams or sequences a
                prompt it is read and left as it is. What other libraries keep keys and values in is read and added to.
            cache: another name of `past_key_values`.
            assistant_model: a smaller decoder with the same vocabulary, which guesses tokens ahead; the text is the
                same, and comes sooner where the guesses are right. On a CPU with compiled kernels.
            generator: draws for the whole batch from one, or for each text from its own of a list (one a returned
                text); None takes PyTorch's global one.
            options: of `GenerateOptions`, which says what each means; `token_type_ids` is accepted and ignored,
                as are `position_ids` that count.

        Returns:
            Ids (B * num_return_sequences, S + new tokens): the prompts as they were given, the new tokens, and the
            padding id after the end of shorter texts. Or a `GenerateOutput`.

        Raises:
            InputError: an option is unknown or impossible, options contradict each other, or a prompt is empty.
        """
        options.pop("token_type_ids", None)
        positions = options.pop("position_ids", None)
        second: Any = attention_mask
        if hasattr(second, "to_dict"):  # as transformers takes a generation_config
            attention_mask, generation_config = None, second
        chosen = GenerateOptions.make(*self.layered(options, generation_config))
        past = _one_of("past_key_values", past_key_values, "cache", cache)
        if not chosen.use_cache and past is not None:
            raise InputError("use_cache is False and past_key_values is given; leave one of them out")
        ids = _one_of("input_ids", input_ids, "inputs", inputs)
        prompts = read_prompts(ids, attention_mask, chosen, self.config, inputs_embeds)
        if positions is not None and not prompts.counted_by(positions):
            raise InputError("position_ids is given; generate counts each text's real tokens from 0, so leave it out")
        if "prepare_inputs_for_generation" in vars(self) and past is None and not prompts.embeds:
            prompts = self._prepared(prompts, chosen)
        copies, beams, columns = chosen.num_return_sequences, chosen.num_beams, prompts.columns
        texts = len(prompts.ids) * copies
        if streamer is not None and (texts > 1 or beams > 1):
            raise InputError(f"streamer takes one text without beams; there are {texts}, and {beams} beams")
        if isinstance(generator, Sequence) and len(generator) != texts:
            raise InputError(f"generator holds {len(generator)}; give one, or one for each of {texts} texts")
        limit = self._limit(columns, chosen)
        pad = chosen.pad_token_id if chosen.pad_token_id is not None else next(iter(chosen.eos_token_id), 0)
        without = [row[-1:] for row in prompts.ids]
        if negative_prompt_ids is not None:
            mask = negative_prompt_attention_mask
            without = read_prompts(negative_prompt_ids, mask, chosen, self.config).ids
        given = prompts.grid_BS.tolist()
        handed = handed_over(
            logits_processor, stopping_criteria, prefix_allowed_tokens_fn, without=without, given=given, pad=pad
        )
        held = past
        if past is not None and not isinstance(past, DecoderCache):
            held = read_cache(past, self.config, prompts.mask_BS)
        if held is not None and max(beams, copies) > 1:
            held.check_model(self.config)
            held = held.copy()
        decoder = decoder_of(
            self, prompts.ids, chosen.use_cache, held, chosen.return_dict_in_generate, prompts.embeds,
            speculation(self, chosen, assistant_model),
        )  # fmt: skip
        keep = chosen.output_scores
        generation = Generation(decoder, [limit] * len(prompts.ids), chosen, generator, tokenizer, handed, keep)
        output, steps, logits, scores = GenerateOutput(), list[Step](), list[Tensor](), generation.scores
        if beams > 1:
            rows = len(prompts.ids) * beams

            def watch(step: Step) -> None:
                if scores is not None:
                    scores.append(step.of_all(step.scores_BV, rows))
                if chosen.output_logits:
                    logits.append(step.of_all(step.logits_BV, rows))
                steps.append(step)

            output.sequences_scores = torch.tensor(generation.beams(watch if chosen.return_dict_in_generate else None))
        else:
            with contextlib.ExitStack() as stack:
                stack.enter_context(settling(decoder))
                if streamer is not None:
                    stack.callback(streamer.end)  # after an error too, so that it is ready for another text
                    streamer.put(torch.tensor(prompts.ids))
                for step in generation.steps():
                    if streamer is not None:
                        streamer.put(torch.tensor(step.tokens))
                    if chosen.output_logits:
                        logits.append(step.of_all(step.logits_BV, texts))
        new = [history.new for history in generation.texts]
        width = max(map(len, new))
        if isinstance(decoder, CachedDecoder) and beams == 1:
            decoder.cache.columns = columns + width - 1
            output.past_key_values = decoder.cache
            if hasattr(past, "update"):  # another library's, which has the new tokens too
                output.past_key_values = past
        filled = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in new], dtype=torch.int64)
        output.sequences = torch.cat([prompts.grid_BS.repeat_interleave(copies, 0), filled.to(prompts.grid_BS)], dim=1)
        if not chosen.return_dict_in_generate:
            return output.sequences
        output.scores = None if scores is None else tuple(scores)
        output.logits = tuple(logits) if chosen.output_logits else None
        if beams > 1 and scores is not None:
            paths = [history.beams for history in generation.texts]
            output.beam_indices = torch.tensor([[*path, *[-1] * (width - len(path))] for path in paths])
        if chosen.output_attentions or chosen.output_hidden_states:
            embed = self.get_input_embeddings()
            vectors = prompts.embeds or [embed(torch.tensor(row, device=self.device)) for row in prompts.ids]
            states = States(self, vectors, prompts.mask_BS, chosen)
            found = states.of_beams(steps) if beams > 1 else states.of_texts(new)
            output.hidden_states, output.attentions = (tuple(parts) or None for parts in found)
        return output

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Keyword arguments of `forward` for a step of a caller's own loop: what is in the cache is left out.

        Args:
            input_ids: (B, S) all ids so far.
            past_key_values: the cache, if there is one.
            attention_mask: (B, S).
            inputs_embeds: (B, S, M), taken instead of ids while nothing is in the cache.
            kwargs: handed on.
        """
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        kwargs = {name: value for name, value in kwargs.items() if name in ("use_cache", "logits_to_keep")}
        if inputs_embeds is not None and not past:
            first: dict[str, Any] = {"inputs_embeds": inputs_embeds}
        else:
            first = {"input_ids": input_ids[:, past:] if past < input_ids.shape[1] else input_ids[:, -1:]}
        return {**first, "past_key_values": past_key_values, "attention_mask": attention_mask, **kwargs}

    def _prepared(self, prompts: Prompts, options: GenerationOptions) -> Prompts:
        """Prompts as a method that was put in place of this object's own prepares them, as PEFT does."""
        mask = prompts.mask_BS.long().to(self.device)
        ids = prompts.grid_BS.to(self.device)
        made = self.prepare_inputs_for_generation(ids, past_key_values=None, attention_mask=mask, use_cache=True)
        if made.get("past_key_values") is not None:
            raise InputError("prepare_inputs_for_generation gave past_key_values; generate takes inputs_embeds of it")
        if made.get("inputs_embeds") is None:
            return prompts
        return read_prompts(ids, made.get("attention_mask"), options, self.config, made["inputs_embeds"])

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """The score of each new token, (texts, steps), from a `GenerateOutput`; zeros after the end of a beam.

        Args:
            sequences: (texts, tokens).
            scores: for each step (rows, vocabulary).
            beam_indices: (texts, steps) of a beam search.
            normalize_logits: return log-probabilities.
        """
        scores_NRV = torch.stack(list(scores))
        if normalize_logits:
            scores_NRV = scores_NRV.log_softmax(-1)
        if beam_indices is None:
            beam_indices = torch.arange(scores_NRV.shape[1])[:, None].expand(-1, len(scores_NRV))
        beam_indices = beam_indices.to(scores_NRV.device)
        steps = int((beam_indices >= 0).sum(1).max())
        rows, tokens = beam_indices[:, :steps], sequences[:, sequences.shape[1] - steps :].to(scores_NRV.device)
        found = scores_NRV[torch.arange(steps, device=rows.device), rows.clamp(min=0), tokens]
        return found.masked_fill(rows < 0, 0.0)

    def layered(self, options: dict[str, Any], config: Any, **usual: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a caller gave, and the defaults below it: the call's own `generation_config` over the model's."""
        defaults = self.generation_defaults(**usual)
        if config is None:
            return options, defaults
        own = GenerationConfig.of(config, self.config).to_diff_dict()
        if {"max_length", "max_new_tokens"} & own.keys():
            defaults = {name: value for name, value in defaults.items() if name not in ("max_length", "max_new_tokens")}
        refused = {name: own[name] for name in own if name in REFUSED or name in NO_EFFECT}
        return {**refused, **options}, {**defaults, **own}

    @shows_options(GenerationOptions)
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
        prompts = read_prompts(input_ids, attention_mask, chosen, self.config)
        if len(prompts.ids) * chosen.num_return_sequences > 1 or chosen.num_beams > 1:
            raise InputError("stream goes on with one text, without beams")
        limit = self._limit(prompts.columns, chosen)
        speculate = speculation(self, chosen)
        decoder = decoder_of(self, prompts.ids, cache=past_key_values, speculate=speculate)
        generation = Generation(decoder, [limit], chosen, generator, tokenizer)

        def tokens() -> Iterator[int]:
            with settling(decoder):
                yield from generation.tokens()

        return TextPieces(tokenizer, skip_special_tokens).of(tokens())

    def generation_defaults(self, **usual: Any) -> dict[str, Any]:
        """Options that are not given: from the configuration, then `usual` ones, then the checkpoint's own."""
        ids = {"eos_token_id": self.config.eos_token_id, "pad_token_id": self.config.pad_token_id}
        return {**ids, **usual, **self.generation_config.to_diff_dict()}

    def warn_of_length(self, tokens: int) -> None:
        """Warn if a text may become longer than the model was trained for."""
        context = self.config.max_position_embeddings
        if tokens > context:
            logger.warning("up to %d tokens are asked for; the model was trained for texts of %d", tokens, context)

    def _limit(self, columns: int, options: GenerationOptions) -> int:
        limit = options.new_tokens(columns)
        if options.min_length > columns + limit:
            logger.warning("min_length is %d; there is room for %d tokens", options.min_length, columns + limit)
        self.warn_of_length(columns + limit)
        return limit


class Prompts(NamedTuple):
    """Prompts as they were given, (B, S), and the real tokens of each, or their vectors where those were given."""

    grid_BS: Tensor
    mask_BS: Tensor
    ids: list[list[int]]
    embeds: list[Tensor]

    @property
    def columns(self) -> int:
        return self.mask_BS.shape[1]

    def counted_by(self, positions: Any) -> bool:
        """Whether positions (B, S) or (1, S) count the real tokens of each text, from wherever on."""
        if not isinstance(positions, Tensor) or positions.shape[-1] != self.columns:
            return False
        each = positions.cpu().expand(self.mask_BS.shape)
        return all(bool((at[real].diff() == 1).all()) for at, real in zip(each, self.mask_BS, strict=True))


def _one_of(name: str, value: Any, other: str, same: Any) -> Any:
    """A value that may be given under either of two names."""
    if value is not None and same is not None and value is not same:
        raise InputError(f"{name} and {other} are given, which mean the same; give one of them")
    return same if value is None else value


def read_prompts(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    config: Config,
    inputs_embeds: Tensor | None = None,
) -> Prompts:
    """The prompts, with ids, with vectors or with both; raises `InputError` where they are wrong."""
    check_tensors(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
    if inputs_embeds is not None:
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != config.hidden_size:
            raise InputError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; it must be (batch, sequence, "
                f"{config.hidden_size})"
            )
        shape = inputs_embeds.shape[:2]
        mask_BS = torch.ones(shape, dtype=torch.bool) if attention_mask is None else attention_mask.ne(0).cpu()
        if mask_BS.shape != shape:
            raise InputError(f"attention_mask has shape {tuple(mask_BS.shape)}; it must be {tuple(shape)}")
        vectors = [row[real.to(row.device)] for row, real in zip(inputs_embeds, mask_BS, strict=True)]
        if not len(vectors) or not all(len(row) for row in vectors):
            raise InputError("a prompt has no token; give at least one")
        if input_ids is None or not input_ids.shape[-1]:
            none_B0 = torch.zeros((len(vectors), 0), dtype=torch.int64, device=inputs_embeds.device)
            return Prompts(none_B0, mask_BS, [[] for _ in vectors], vectors)
        own_mask = None if attention_mask is None else attention_mask[:, max(0, shape[1] - input_ids.shape[1]) :]
        own = read_prompts(input_ids, own_mask, options, config)
        if len(own.ids) != len(vectors):
            raise InputError(f"input_ids has {len(own.ids)} prompts and inputs_embeds {len(vectors)}")
        return Prompts(own.grid_BS, mask_BS, own.ids, vectors)
    if input_ids is None:
        if config.bos_token_id is None:
            raise InputError("input_ids is not given, and the configuration has no bos_token_id to begin with")
        input_ids = torch.tensor([[config.bos_token_id]])
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
    mask_BS = attention_mask.ne(0).cpu()
    given = zip(input_ids.tolist(), mask_BS.tolist(), strict=True)
    prompts = [[i for i, real in zip(ids, mask, strict=True) if real] for ids, mask in given]
    if not prompts or not all(prompts):
        raise InputError("a prompt has no token; give at least one, such as bos_token_id")
    low, high = min(map(min, prompts)), max(map(max, prompts))
    if low < 0 or high >= config.vocab_size:
        raise InputError(
            f"input_ids holds {low if low < 0 else high}; the vocabulary has ids 0 to {config.vocab_size - 1}"
        )
    return Prompts(input_ids.long(), mask_BS, prompts, [])
