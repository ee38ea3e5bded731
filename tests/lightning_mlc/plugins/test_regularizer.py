"""The regularizer in a loop of one's own: its values, how a step is divided, what is saved, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example_rows, save_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_mlc.errors import UserError
from lightning_mlc.plugins import MLCRegularizer
from lightning_mlc.plugins.prompts import prompts_of_step
from lightning_mlc.plugins.states import PromptStates

ROWS = [row["prompt"] for row in example_rows(6)]
UNEVEN = [ROWS[0], {"en": "Short?", "zh": "短？"}, *ROWS[2:]]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder)


def regularizer(folder: Path, rows: Any = UNEVEN, **options: Any) -> MLCRegularizer:
    options = {"extractor_dim": 8, "prompts_per_step": 4, "seed": 3, **options}
    return MLCRegularizer(rows, AutoTokenizer.from_pretrained(folder), **options)


def published(rows: Tensor, temperature: float, scale: str) -> Tensor:
    """The loss of one prompt in float64, as the equation has it."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    values = torch.linalg.svdvals(unit)
    top = values[0].detach() if scale == "top" else 1.0
    return -(values / (top * temperature)).log_softmax(0)[0]


def by_hand(folder: Path, rows: list[dict[str, str]], layer: int, extractor: nn.Module, **options: Any) -> Tensor:
    """The mean loss of ``rows``: each translation alone through the model in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = []
    for row in rows:
        states = []
        for text in row.values():
            turns = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
            states.append(model(ids, output_hidden_states=True).hidden_states[layer][0, -1])
        losses.append(published(extractor(torch.stack(states)), **options))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("layer", [-1, 0, 1, 2, 0.5])
@pytest.mark.parametrize("extractor", ["frozen", "none"])
def test_the_loss_is_that_of_the_equation(layer: int | float, extractor: Any, model: Any, model_folder: Path) -> None:
    options: Any = {"temperature": 0.3, "scale": "none" if layer == 1 else "top"}
    mlc = regularizer(model_folder, layer=layer, extractor=extractor, weight=0.7, **options)
    found = mlc.loss(model, step=5)
    assert mlc.representation is not None
    chosen = [UNEVEN[index] for index in prompts_of_step(6, 4, 3, 5)]
    index = 2 if layer == 0.5 else int(layer)  # of three layers; 1.5 is rounded to the even number
    expected = 0.7 * by_hand(model_folder, chosen, index, mlc.representation.extractor.double(), **options)
    # Three layers in float32: measured 2e-7 of the value.
    assert found.item() == pytest.approx(expected.item(), rel=5e-6)


def gradients(model: nn.Module) -> Tensor:
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    model.zero_grad()
    return found


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 2), (2, 1), (2, 2), (1, 3), (4, 2)])
def test_a_step_does_not_depend_on_how_it_is_divided(
    world_size: int, micro_batches: int, model: Any, model_folder: Path
) -> None:
    mlc = regularizer(model_folder)
    whole = mlc.loss(model, 1)
    whole.backward()
    expected = gradients(model)
    logged = mlc.metrics()
    total = torch.zeros(())
    parts = world_size * micro_batches
    for rank in range(world_size):
        for micro_batch in range(micro_batches):
            part = mlc.loss(model, 1, rank, world_size, micro_batch, micro_batches) / parts
            total += part.detach()
            part.backward()
    assert total.item() == pytest.approx(whole.item(), rel=1e-5)
    # Sums of float32 in another order.
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-7)
    found = mlc.metrics()
    if world_size > 1:  # prompts are compared with those of the same process
        logged, found = (
            {name: value for name, value in own.items() if not name.endswith("between_prompts")}
            for own in (logged, found)
        )
    assert found == pytest.approx(logged, rel=1e-5)


def test_steps_between_have_no_loss(model: Any, model_folder: Path) -> None:
    mlc = regularizer(model_folder, every_n_steps=3)
    assert [mlc.loss(model, step).item() > 0 for step in range(7)] == [True, False, False] * 2 + [True]
    mlc.loss(model, 1).backward()  # a loop need not ask whether the step has a loss
    assert all(parameter.grad is None for parameter in model.parameters())
    assert regularizer(model_folder, weight=0).loss(model, 0).item() == 0


def test_metrics_are_means_since_the_last_call(model: Any, model_folder: Path) -> None:
    mlc = regularizer(model_folder, weight=2.0)
    losses = [mlc.loss(model, step).item() / 2 for step in range(3)]
    found = mlc.metrics()
    assert found["mlc/loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert found.keys() == {
        "mlc/loss",
        "mlc/excess",
        "mlc/explained_variance",
        "mlc/min_cosine",
        "mlc/between_prompts",
        "mlc/raw/explained_variance",
        "mlc/raw/min_cosine",
        "mlc/raw/between_prompts",
    }
    assert mlc.metrics() == {}
    mlc.loss(model, 3, detailed=False)
    assert mlc.metrics().keys() == {"mlc/loss"}


def test_the_loss_can_be_learned(model: Any, model_folder: Path) -> None:
    mlc = regularizer(model_folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    excess = []
    for step in range(12):
        mlc.loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        excess.append(mlc.metrics()["mlc/excess"])
    assert sum(excess[-3:]) < 0.3 * sum(excess[:3])


@pytest.mark.parametrize("seeds", [(3, 3), (3, 4)])
def test_the_frozen_extractor_follows_from_the_seed(seeds: tuple[int, int], model: Any, model_folder: Path) -> None:
    weights = []
    for seed in seeds:
        torch.manual_seed(len(weights))  # the caller's own seed has no influence
        mlc = regularizer(model_folder, seed=seed)
        before = torch.random.get_rng_state()
        mlc.prepare(model)
        assert torch.equal(before, torch.random.get_rng_state())
        assert not any(parameter.requires_grad for parameter in mlc.parameters())
        weights.append(mlc.state_dict()["representation.extractor.weight"])
    assert torch.equal(*weights) == (seeds[0] == seeds[1])


def test_a_linear_extractor_is_trained(model: Any, model_folder: Path) -> None:
    mlc = regularizer(model_folder, extractor="linear")
    mlc.prepare(model)
    mlc.loss(model, 0).backward()
    assert [parameter.shape for parameter in mlc.parameters()] == [(8, 32), (8,)]
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in mlc.parameters())


def test_the_model_is_no_part_of_the_regularizer(model: Any, model_folder: Path) -> None:
    mlc = regularizer(model_folder, extractor="linear")
    mlc.loss(model, 0)
    assert set(mlc.state_dict()) == {"representation.extractor.weight", "representation.extractor.bias"}


@pytest.mark.parametrize("extractor", ["frozen", "linear", "none"])
@pytest.mark.parametrize("center", [False, True])
def test_a_restored_regularizer_goes_on_as_if_never_stopped(
    extractor: Any, center: bool, model: Any, model_folder: Path, tmp_path: Path
) -> None:
    options: Any = {"extractor": extractor, "center": center}
    mlc = regularizer(model_folder, **options)
    for step in range(2):
        mlc.loss(model, step)
    if extractor == "linear":
        with torch.no_grad():
            mlc.get_parameter("representation.extractor.weight").add_(0.25)
    mlc.save(tmp_path / "new" / "folder")
    expected = mlc.loss(model, 2)
    resumed = regularizer(model_folder, **options)
    resumed.restore(tmp_path / "new" / "folder", model)
    assert torch.equal(resumed.loss(model, 2), expected)


def test_centring_does_not_depend_on_micro_batches(model: Any, model_folder: Path) -> None:
    one, two = (regularizer(model_folder, center=True) for _ in range(2))
    for step in range(3):
        whole = one.loss(model, step)
        halves = [two.loss(model, step, micro_batch=part, micro_batches=2) for part in range(2)]
        assert sum(half.item() for half in halves) / 2 == pytest.approx(whole.item(), rel=1e-4)


def test_centring_subtracts_the_mean_of_the_steps_before(model: Any, model_folder: Path) -> None:
    centred, plain = regularizer(model_folder, center=True), regularizer(model_folder)
    assert centred.loss(model, 0).item() == plain.loss(model, 0).item()  # the mean is still 0
    assert centred.loss(model, 1).item() > 2 * plain.loss(model, 1).item()  # all states have a part in common


def test_an_interrupted_step_leaves_nothing_in_the_mean(model: Any, model_folder: Path) -> None:
    interrupted, whole = (regularizer(model_folder, center=True) for _ in range(2))
    interrupted.loss(model, 5, micro_batch=0, micro_batches=2)
    assert interrupted.loss(model, 0).item() == whole.loss(model, 0).item()
    assert interrupted.loss(model, 1).item() == whole.loss(model, 1).item()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 4}, "seed: is 4, but was 3 in"),
        ({"extractor": "none"}, "extractor: is none, but was frozen in"),
        ({"extractor_dim": 4}, "extractor_dim: is 4, but was 8 in"),
        ({"languages": ["en", "zh"]}, r"languages: is \['en', 'zh'\], but was \['en', 'sw', 'zh'\] in"),
        ({"prompts_per_step": 2}, "prompts_per_step: is 2, but was 4 in"),
        ({"rows": UNEVEN[:5]}, "prompts: is 5, but was 6 in"),
    ],
)
def test_a_resumed_run_keeps_its_options(
    changed: dict[str, Any], message: str, model: Any, model_folder: Path, tmp_path: Path
) -> None:
    mlc = regularizer(model_folder)
    mlc.prepare(model)
    mlc.save(tmp_path)
    with pytest.raises(UserError, match=f"^{message}"):
        regularizer(model_folder, **changed).restore(tmp_path, model)


def test_changes_of_other_options_are_told(
    model: Any, model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mlc = regularizer(model_folder)
    mlc.prepare(model)
    mlc.save(tmp_path)
    regularizer(model_folder).restore(tmp_path, model)
    assert "but was" not in caplog.text
    changed: Any = {"weight": 0.4, "temperature": 0.5, "scale": "none", "every_n_steps": 2, "max_prompt_length": 99}
    regularizer(model_folder, **changed).restore(tmp_path, model)
    for name, value in changed.items():
        assert f"MLC: {name} is {value}, but was " in caplog.text


def test_a_damaged_state_is_told(model: Any, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mlc.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"mlc.safetensors: cannot be read \("):
        regularizer(model_folder).restore(tmp_path, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_dtype_of_a_model(dtype: torch.dtype, model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    mlc = regularizer(model_folder)
    loss = mlc.loss(model, 0)
    loss.backward()
    assert loss.isfinite()
    assert gradients(model).isfinite().all()
    reference = regularizer(model_folder).loss(AutoModelForCausalLM.from_pretrained(model_folder), 0)
    # bfloat16 has 8 bits: hidden states differ by some 1 %, the loss by the square of it and the rounding of cosines.
    assert loss.item() == pytest.approx(reference.item(), rel=0.1 if dtype == torch.bfloat16 else 1e-5)


def test_few_prompts_are_used_whole(model: Any, model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    mlc = regularizer(model_folder, prompts_per_step=50)
    assert "MLC has only 6 prompts, so a step uses all of them instead of 50" in caplog.text
    assert mlc.prompts_per_step == 6


def test_a_model_without_head_is_called_as_a_whole(model_folder: Path) -> None:
    """A reward model: the hidden states are those of the causal LM with the same weights."""
    causal = AutoModelForCausalLM.from_pretrained(model_folder)
    reward = LlamaForSequenceClassification(LlamaConfig.from_pretrained(model_folder, num_labels=1))
    reward.model.load_state_dict(causal.model.state_dict())
    reward.config.pad_token_id = 0
    losses = [regularizer(model_folder).loss(given, 0) for given in (causal, reward)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)


def test_translations_run_no_further_than_their_layer(model: Any, model_folder: Path) -> None:
    mlc = regularizer(model_folder, layer=1)
    mlc.loss(model, 0)  # the self-check runs all of it
    calls = {"head": 0, "last": 0, "first": 0}

    def count(name: str) -> Any:
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    model.lm_head.register_forward_hook(count("head"))
    model.model.layers[2].register_forward_hook(count("last"))
    model.model.layers[0].register_forward_hook(count("first"))
    mlc.loss(model, 1)
    assert calls["first"] > 0
    assert calls["head"] == calls["last"] == 0


class Somebody(nn.Module):
    """A model that is not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1}, "weight: must be 0 or above, got -1"),
        ({"temperature": 0}, "temperature: must be from 0.01 to 100, got 0"),
        ({"extractor_dim": 1}, "extractor_dim: must be at least 2, got 1"),
        ({"every_n_steps": 0}, "every_n_steps: must be at least 1, got 0"),
        ({"prompts_per_step": 0}, "prompts_per_step: must be at least 1, got 0"),
        ({"scale": "both"}, "scale: must be one of top, none, got 'both'"),
        ({"extractor": "lora"}, "extractor: must be one of frozen, linear, none, got 'lora'"),
        ({"layer": 1.5}, "layer: 1.5 is not a fraction of depth"),
        ({"layer": "last"}, "layer: must be a number, got 'last'"),
        ({"layer": "auto"}, "layer: auto is an option of `lightning-mlc fit`; give the number of a layer"),
        ({"weight": None}, "weight: must be a number, got None"),
        ({"weight": True}, "weight: must be a number, got True"),
        ({"weight": float("nan")}, "weight: must be 0 or above, got nan"),
        ({"temperature": "hot"}, "temperature: must be a number, got 'hot'"),
        ({"every_n_steps": 1.5}, "every_n_steps: must be an integer, got 1.5"),
        ({"prompts_per_step": "all"}, "prompts_per_step: must be an integer, got 'all'"),
        ({"max_prompt_length": 0}, "max_prompt_length: must be at least 1, got 0"),
        ({"center": "no"}, "center: must be true or false, got 'no'"),
        ({"seed": -1}, "seed: must be from 0 to 4294967295, got -1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, model_folder: Path) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        regularizer(model_folder, **options)


@pytest.mark.parametrize("tokenizer", [None, "gpt2"])
def test_what_is_no_tokenizer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"^tokenizer: must be a tokenizer with a chat template, got (NoneType|str)"):
        MLCRegularizer(ROWS, tokenizer)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"micro_batch": 2, "micro_batches": 2}, "micro_batch: must be from 0 to micro_batches - 1, which is 1, got 2"),
        ({"rank": 2, "world_size": 2}, "rank: must be from 0 to world_size - 1, which is 1, got 2"),
        ({"rank": -1}, "rank: must be from 0 to world_size - 1, which is 0, got -1"),
    ],
)
def test_a_share_that_does_not_exist_is_refused(
    place: dict[str, int], message: str, model: Any, model_folder: Path
) -> None:
    """It would have no prompt, so a loop that counts wrong would train without the loss."""
    with pytest.raises(UserError, match=f"^{message}"):
        regularizer(model_folder).loss(model, 0, **place)


@pytest.mark.parametrize("extractor", ["frozen", "linear"])
def test_a_layer_that_no_trained_weight_reaches_is_refused(extractor: Any, model: Any, model_folder: Path) -> None:
    model.get_input_embeddings().requires_grad_(False)
    mlc = regularizer(model_folder, layer=0, extractor=extractor)
    with pytest.raises(UserError, match=r"^layer: no weight that is trained has an influence on layer 0, so the loss"):
        mlc.loss(model, 0)
    with torch.no_grad():
        assert mlc.loss(model, 0) > 0
    regularizer(model_folder, layer=1, extractor=extractor).loss(model, 0).backward()


def test_bad_models_are_refused(model: Any, model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"^model: must be a model of transformers.* got Somebody"):
        regularizer(model_folder).loss(Somebody(), 0)
    sizes: Any = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    with pytest.raises(UserError, match=r"^model: ViTForImageClassification takes no text; give a causal LM"):
        regularizer(model_folder).loss(ViTForImageClassification(ViTConfig(**sizes)), 0)
    with pytest.raises(UserError, match=r"^layer: the model has no layer 9; it has 3 layers"):
        regularizer(model_folder, layer=9).loss(model, 0)
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match=r"^model: has prompt-learning adapters"):
        regularizer(model_folder).loss(peft.get_peft_model(model, config), 0)


def test_prompts_that_do_not_fit_the_model_are_refused_before_the_first_step(model: Any, model_folder: Path) -> None:
    sizes: Any = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 300, "n_positions": 32}
    long = [{"en": "a" * 90, "sw": "b"}]
    with pytest.raises(UserError, match=r"^max_prompt_length: a prompt has \d+ tokens, but .* 32 positions; give 32"):
        regularizer(model_folder, long).prepare(GPT2LMHeadModel(GPT2Config(**sizes)))
    regularizer(model_folder, long, max_prompt_length=32).loss(GPT2LMHeadModel(GPT2Config(**sizes)), 0).backward()
    model.resize_token_embeddings(200)
    with pytest.raises(UserError, match=r"^tokenizer: gives ids up to \d+, but the model embeds 200 tokens"):
        regularizer(model_folder).prepare(model)


def test_adapters_get_the_gradient(model: Any, model_folder: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    mlc = regularizer(model_folder)
    mlc.loss(adapted, 0).backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


def test_whole_calls_give_the_same_states(model: Any, model_folder: Path) -> None:
    """The plain way, which sharded models take, against the packed one."""
    mlc = regularizer(model_folder)
    prompts = mlc.groups.sequences(range(6))
    fast = PromptStates(model, -1, mlc.groups.longest, 0)
    plain = PromptStates(model, -1, mlc.groups.longest, 0)
    plain._policy, plain.layout = None, type(plain.layout)()
    found, present = fast(model, prompts, 3)
    expected, same = plain(model, prompts, 3)
    assert torch.equal(present, same)
    assert present.sum() == 17
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
