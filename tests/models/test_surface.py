"""What scripts written for transformers ask of a model by habit, beside loading and generating."""

import copy

import pytest
import torch
import transformers
from torch import nn

import modernbert
from modernbert import auto
from modernbert.errors import ConfigError, InputError
from modernbert.models.decoder import ModernBertDecoderPreTrainedModel
from modernbert.models.encoder import ModernBertPreTrainedModel
from modernbert.models.outputs import SequenceClassifierOutput
from tests.conftest import SMALL, model_of, padded_batch
from tests.heads import CLASSES
from tests.interop.batches import batch_of

IDS = torch.tensor([[5, 6, 7]])
ENCODERS = [name for name in CLASSES if "Decoder" not in name]


@pytest.mark.parametrize("name", CLASSES)
def test_names_that_tools_ask_for(name):
    model = model_of(name)
    decoder = "Decoder" in name
    assert isinstance(model, ModernBertDecoderPreTrainedModel if decoder else ModernBertPreTrainedModel)
    assert model.can_generate() is type(model).can_generate() is (name == "ModernBertDecoderForCausalLM")
    assert (model.main_input_name, model.framework, model.name_or_path) == ("input_ids", "pt", "")
    assert model.supports_gradient_checkpointing
    assert not model.is_parallelizable
    assert not model.is_quantized
    assert model._tied_weights_keys == dict(model.tied_weights)
    assert {type(layer).__name__ for layer in model.base_model.layers} == set(model._no_split_modules)
    assert model.num_labels == model.config.num_labels
    assert model.get_encoder() is model.get_decoder() is model.base_model
    assert model.get_parameter_or_buffer(next(iter(model.state_dict()))).dim() == 2
    model.warnings_issued["estimate_tokens"] = True
    model.add_model_tags("unsloth")
    model.add_model_tags(["unsloth", "trl"])
    assert model.model_tags == ["unsloth", "trl"]
    assert not hasattr(model, "hf_device_map")  # trainers leave a model that has one where it is
    weights = {p.data_ptr(): p.nbytes for p in model.parameters()}
    assert model.get_memory_footprint() == sum(weights.values())
    if "MultipleChoice" not in name:
        assert len(model(**model.dummy_inputs)[0]) == 3


def test_where_a_model_came_from_and_lies(tmp_path):
    model_of("ModernBertModel").save_pretrained(tmp_path)
    model = modernbert.AutoModel.from_pretrained(tmp_path, device_map="cpu")
    assert model.name_or_path == str(tmp_path)
    assert model.hf_device_map == {"": "cpu"}


def test_optimized_models_count_their_bytes():
    model = model_of("ModernBertForMaskedLM")
    assert copy.deepcopy(model).optimize_for_inference().get_memory_footprint() == model.get_memory_footprint()


@pytest.mark.parametrize(
    "name", ["add_adapter", "get_extended_attention_mask", "resize_position_embeddings", "generate"]
)
def test_what_has_no_meaning_says_what_serves(name):
    model = model_of("ModernBertForMaskedLM")
    assert not hasattr(model, name)
    with pytest.raises(AttributeError, match=rf"^ModernBertForMaskedLM has no {name}; "):
        getattr(model, name)
    with pytest.raises(AttributeError, match=r"'ModernBertForMaskedLM' object has no attribute 'nonsense'"):
        _ = model.nonsense


def test_the_attention_implementation_can_be_changed():
    model, (ids, mask) = model_of("ModernBertForMaskedLM"), padded_batch([30, 7])
    before = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    assert model.attn_implementation == model.base_model.backend.name == "eager"
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, before, rtol=0, atol=1e-5)
    model.optimize_for_inference().set_attn_implementation("sdpa")
    assert model.base_model.backend.name == "sdpa"
    model.set_attn_implementation(None)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


def test_inputs_can_require_gradients_where_weights_do_not():
    model = model_of("ModernBertForMaskedLM").requires_grad_(False)
    assert not model(IDS).logits.requires_grad
    model.enable_input_require_grads()
    model.enable_input_require_grads()
    assert model(IDS).logits.requires_grad
    with torch.inference_mode():
        assert not model(IDS).logits.requires_grad
    copy.deepcopy(model)(IDS)
    model.disable_input_require_grads()
    model.disable_input_require_grads()
    assert not model(IDS).logits.requires_grad


@pytest.mark.parametrize("name", CLASSES)
def test_what_changes_nothing_is_taken_and_what_would_is_refused(name):
    model, batch = model_of(name), batch_of(name)
    wanted = model(**batch)[0]
    batch |= {"token_type_ids": torch.zeros_like(batch["input_ids"]), "head_mask": None, "past_key_values": None,
              "encoder_hidden_states": None, "use_cache": name in ENCODERS}  # fmt: skip
    assert torch.equal(model(**batch)[0], wanted)
    with pytest.raises(InputError, match=r"^head_mask is given; attention heads are removed by model.prune_heads"):
        model(**{**batch, "head_mask": torch.ones(4, 3)})
    if name in ENCODERS:
        with pytest.raises(InputError, match=r"^past_key_values is given; an encoder sees whole texts"):
            model(**{**batch, "past_key_values": ()})
    if "CausalLM" not in name:
        with pytest.raises(InputError, match=r"^shift_labels is given; "):
            model(**{**batch, "shift_labels": IDS})
    if "For" not in name:
        with pytest.raises(InputError, match=rf"^labels is given; {name} has no head and no loss; AutoModelFor"):
            model(**batch, labels=IDS)


def test_lengths_by_the_names_of_flash_attention():
    model = model_of("ModernBertForMaskedLM")
    ends, ids = torch.tensor([0, 2, 5], dtype=torch.int32), torch.randint(3, 96, (1, 5))
    wanted = model(ids, cu_seqlens=ends).logits
    named = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 3, "max_length_k": 3}
    assert torch.equal(model(ids, **named).logits, wanted)
    with pytest.raises(InputError, match=r"^max_length_k is 4 and max_seqlen is 3; they must be the same"):
        model(ids, **{**named, "max_length_k": 4})


def test_labels_that_are_shifted_already():
    model, ids = model_of("ModernBertDecoderForCausalLM"), torch.randint(3, 96, (2, 6))
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    wanted = model(ids, labels=ids).loss
    assert torch.equal(model(ids, shift_labels=shifted).loss, wanted)
    assert torch.equal(model(ids, labels=torch.zeros_like(ids), shift_labels=shifted).loss, wanted)


@pytest.mark.parametrize("name", [name for name in CLASSES if "For" in name])
def test_the_loss_by_itself(name):
    model, batch = model_of(name), batch_of(name)
    output = model(**batch)
    given = {"logits": output.get("logits"), "vocab_size": 96, **batch}
    if "SequenceClassification" in name:
        given = {"pooled_logits": output.logits, "labels": batch["labels"], "config": model.config}
    if "QuestionAnswering" in name:
        given |= {"start_logits": output.start_logits, "end_logits": output.end_logits}
    torch.testing.assert_close(model.loss_function(**given), output.loss)


def four_dimensions(mask, dtype, causal=False):
    """The mask (B, 1, S, S) that a padding mask stands for."""
    seen = mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    seen = seen.tril() if causal else seen
    if not dtype.is_floating_point:
        return seen.to(dtype)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
@pytest.mark.parametrize("name", ["ModernBertModel", "ModernBertDecoderModel"])
def test_masks_of_four_dimensions_that_say_padding(name, dtype):
    model, causal = model_of(name), "Decoder" in name
    ids, mask = padded_batch([8, 5])
    wanted = model(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(model(ids, attention_mask=four_dimensions(mask, dtype, causal)).last_hidden_state, wanted)
    if dtype != torch.int64:
        theirs = getattr(transformers, name)._from_config(
            getattr(transformers, type(model.config).__name__)(**model.config.to_dict()), attn_implementation="eager"
        )
        theirs.load_state_dict(model.state_dict())
        mask4 = four_dimensions(mask, dtype, causal)
        mask4 = mask4 if mask4.is_floating_point() else torch.where(mask4, 0.0, -1e9)
        got = theirs.eval()(ids, attention_mask=mask4).last_hidden_state
        torch.testing.assert_close(got[mask == 1], wanted[mask == 1], rtol=0, atol=1e-5)


def test_masks_of_four_dimensions_that_say_more_are_refused():
    encoder, decoder = model_of("ModernBertModel"), model_of("ModernBertDecoderModel")
    ids, mask = padded_batch([8, 5])
    plain = four_dimensions(mask, torch.bool)
    assert torch.equal(
        encoder(ids, attention_mask=plain[:, :, :1])[0], encoder(ids, attention_mask=mask).last_hidden_state
    )
    more = r"attention_mask has shape \(2, 1, 8, 8\) and says more than where padding is"
    for model, wrong in ((encoder, plain.tril()), (decoder, plain), (encoder, plain + 0.5)):
        with pytest.raises(InputError, match=more):
            model(ids, attention_mask=wrong)
    ids, mask = padded_batch([40, 5])  # local layers see 8 tokens to either side
    with pytest.raises(InputError, match="or meets texts longer than the local window"):
        encoder(ids, attention_mask=four_dimensions(mask, torch.bool))
    with pytest.raises(InputError, match=r"attention_mask has shape \(2, 3, 4, 4\); with this input it must be"):
        encoder(ids, attention_mask=torch.ones(2, 3, 4, 4))


def test_a_configuration_can_ask_for_recomputing():
    config = modernbert.ModernBertConfig(**SMALL)
    config.gradient_checkpointing = True
    model = modernbert.ModernBertForMaskedLM(config)
    assert model.is_gradient_checkpointing
    assert model.model.is_gradient_checkpointing


class Scored(ModernBertPreTrainedModel):
    """A head of somebody's own, as scripts write them for transformers."""

    def __init__(self, config):
        super().__init__(config)
        self.model = modernbert.ModernBertModel(config)
        self.scorer = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        states = self.model(input_ids, attention_mask=attention_mask)[0]
        logits = self.scorer(states[:, 0])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits)


def test_a_head_of_one_s_own(tmp_path):
    config = modernbert.ModernBertConfig(**SMALL, num_labels=3)
    model = Scored(config).eval()
    assert 0.01 < model.scorer.weight.std() < 0.03
    assert not model.scorer.bias.any()
    wanted = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(Scored.from_pretrained(tmp_path)(IDS).logits, wanted)
    model.model.save_pretrained(tmp_path / "body")
    fresh = Scored.from_pretrained(tmp_path / "body", num_labels=3)
    assert torch.equal(fresh.model(IDS)[0], model.model(IDS)[0])
    before = model.scorer.weight.clone()
    model.post_init()
    assert torch.equal(model.scorer.weight, before)
    model.apply(model._init_weights)
    assert not torch.equal(model.scorer.weight, before)
    model.init_weights()
    assert model(IDS).logits.isfinite().all()


class Named(ModernBertPreTrainedModel):
    """Another, as older scripts have it: an encoder by another name, and `init_weights` at the end."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = modernbert.ModernBertModel(config)
        self.scorer = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights()

    def forward(self, input_ids):
        return self.scorer(self.bert(input_ids)[0][:, 0])


class Projected(modernbert.ModernBertModel):
    """A bare encoder with a layer more."""

    def __init__(self, config, width=5):
        super().__init__(config)
        self.projection = nn.Linear(config.hidden_size, width)
        self.post_init()

    def forward(self, input_ids):
        return self.projection(super().forward(input_ids)[0][:, 0])


@pytest.mark.parametrize("cls", [Named, Projected])
def test_classes_of_one_s_own_over_checkpoints_of_others(cls, tmp_path):
    plain = model_of("ModernBertForMaskedLM")
    plain.save_pretrained(tmp_path / "language")
    plain.model.save_pretrained(tmp_path / "bare")
    for folder in ("language", "bare"):
        model = cls.from_pretrained(tmp_path / folder)
        assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
        body = model.bert if cls is Named else model
        assert torch.equal(body.layers[3].mlp.Wo.weight, plain.model.layers[3].mlp.Wo.weight)
        assert model.dtype is torch.float32
        model.save_pretrained(tmp_path / "own")
        assert torch.equal(cls.from_pretrained(tmp_path / "own")(IDS), model(IDS))


def test_arguments_of_a_class_of_one_s_own(tmp_path):
    model_of("ModernBertModel").save_pretrained(tmp_path)
    assert Projected.from_pretrained(tmp_path, width=7, num_labels=3)(IDS).shape == (1, 7)


def test_a_model_s_numbers_of_labels_and_ids_can_be_set():
    model = model_of("ModernBertForSequenceClassification", num_labels=3)
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.num_labels, model.vocab_size = 3, model.config.vocab_size
    assert model.config.id2label[2] == "c"
    model.classifier, model.num_labels = nn.Linear(model.config.hidden_size, 5), 5
    assert model.config.num_labels == 5
    assert model(IDS, labels=torch.tensor([4])).loss.isfinite()
    with pytest.raises(ConfigError, match="vocab_size is set to 5"):
        model.vocab_size = 5


@pytest.mark.parametrize("kept", [[0, 1], [0, 2, 3]])
def test_layers_are_taken_out(kept, tmp_path):
    model = model_of("ModernBertForMaskedLM")
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in kept])
    model.config.num_hidden_layers = len(kept)
    assert model.config.layer_types == [layer.kind for layer in model.model.layers]
    model.save_pretrained(tmp_path)
    for lib in (modernbert, transformers):
        again = lib.ModernBertForMaskedLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    with pytest.raises(ConfigError, match="num_hidden_layers is set to 1"):
        model.config.num_hidden_layers = 1


def test_a_new_token_of_a_tied_output_has_no_bias():
    model, tied = (model_of("ModernBertForMaskedLM", tie_word_embeddings=tied) for tied in (False, True))
    for made in (model, tied):
        nn.init.constant_(made.decoder.bias, 2.0)
        made.resize_token_embeddings(SMALL["vocab_size"] + 1)
    assert (model.decoder.bias[-1].round(), tied.decoder.bias[-1]) == (2, 0)


@pytest.mark.parametrize(
    "traced",
    [
        lambda model: torch.export.export(model, (IDS,), strict=False),
        pytest.param(
            lambda model: torch.jit.trace(model, (IDS,)), marks=pytest.mark.filterwarnings("ignore::DeprecationWarning")
        ),
    ],
)
def test_traces_of_whole_models_are_refused(traced):
    with pytest.raises(InputError, match=r"which no trace of a model can hold; torch\.compile works"):
        traced(model_of("ModernBertForMaskedLM"))


def test_classes_of_one_s_own_are_registered(monkeypatch, tmp_path):
    for table in (auto._CONFIGS, auto._CLASSES, auto._MODELS["base"]):
        for name in {*table} | {"own", "Own"}:
            monkeypatch.setitem(table, name, table.get(name))
    monkeypatch.delitem(auto._CONFIGS, "own")
    monkeypatch.delitem(auto._MODELS["base"], "own")

    class OwnConfig(modernbert.ModernBertConfig):
        model_type = "own"

    modernbert.AutoConfig.register("own", OwnConfig)
    own = type("Own", (Projected,), {"config_class": OwnConfig})
    modernbert.AutoModel.register(OwnConfig, own)
    modernbert.AutoModel.from_config(OwnConfig(**SMALL)).save_pretrained(tmp_path)
    assert type(modernbert.AutoModel.from_pretrained(tmp_path)) is own
    for register, given in ((modernbert.AutoConfig.register, "own"), (modernbert.AutoModel.register, OwnConfig)):
        with pytest.raises(InputError, match=r"'own' (is known )?already; exist_ok=True replaces it"):
            register(given, OwnConfig)
    with pytest.raises(InputError, match="model_type is 'other'; that of OwnConfig is 'own'"):
        modernbert.AutoConfig.register("other", OwnConfig)


def test_a_configuration_of_no_architecture_is_refused():
    class Own(modernbert.PretrainedConfig):
        model_type = "own"

    with pytest.raises(TypeError, match="Own is no architecture; derive from ModernBertConfig or"):
        Own()


@pytest.mark.parametrize("name", ["Trainer", "TrainingArguments", "DataCollatorWithPadding", "EarlyStoppingCallback"])
def test_what_is_transformers_own_is_said_to_be(name):
    with pytest.raises(ImportError, match=f"{name} is transformers' own, .*: from transformers import {name}"):
        getattr(modernbert, name)
