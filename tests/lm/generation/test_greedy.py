from itertools import islice

import pytest
import torch
from transformers import DynamicCache

from fastattn.lm import generate_tokens, load, prefill
from fastattn.lm.runner import prefill_steps

IMPLEMENTATIONS = ["sdpa", "eager", "fastattn"]


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def model(request):
    return load("tiny", attn=request.param, device="cpu", dtype=torch.float32).model


@pytest.mark.parametrize("batch, length", [(1, 1), (1, 40), (3, 17)])
def test_greedy_tokens_are_those_of_transformers(model, batch, length):
    ids = torch.randint(1024, (batch, length))
    found = torch.stack(list(islice(generate_tokens(model, ids), 6)), 1)
    everything = torch.ones_like(ids)  # or transformers would take a random token for padding
    expected = model.generate(ids, attention_mask=everything, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected[:, length:])


@pytest.mark.parametrize("step", [1, 7, 19, 20, 2048])
def test_steps_change_nothing(model, step):
    ids = torch.randint(1024, (2, 20))
    expected = list(islice(generate_tokens(model, ids), 4))
    found = list(islice(generate_tokens(model, ids, step=step), 4))
    assert torch.equal(torch.stack(found), torch.stack(expected))


@pytest.mark.parametrize(
    "length, step, passes", [(10, 4, [4, 4, 1, 1]), (9, 4, [4, 4, 1]), (9, 2048, [8, 1]), (1, 4, [1])]
)
def test_the_last_token_goes_alone_after_steps_over_the_others(model, length, step, passes):
    seen = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with hook:
        cache = DynamicCache(config=model.config)
        token = prefill(model, torch.randint(1024, (2, length)), cache, step)
    assert seen == passes
    assert token.shape == (2,)
    assert cache.get_seq_length() == length


def test_logits_are_made_for_one_position_only(model):
    seen = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2]))
    with hook:
        list(islice(generate_tokens(model, torch.randint(1024, (2, 30)), step=8), 3))
    assert seen == [(2, 1)] * 3


def test_a_given_cache_is_continued(model):
    ids = torch.randint(1024, (1, 24))
    cache = DynamicCache(config=model.config)
    prefill(model, ids[:, :10], cache)
    found = list(islice(generate_tokens(model, ids[:, 10:], cache=cache), 3))
    assert torch.equal(torch.stack(found), torch.stack(list(islice(generate_tokens(model, ids), 3))))


def test_generation_keeps_no_graph_and_leaves_the_mode_alone(model):
    tokens = generate_tokens(model, torch.randint(1024, (1, 5)))
    assert next(tokens).is_inference()
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("ids", [torch.zeros(3, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64)])
def test_prompts_without_tokens(model, ids):
    with pytest.raises(ValueError, match="ids: expected"):
        prefill(model, ids, DynamicCache())


def test_step_of_zero(model):
    with pytest.raises(ValueError, match="step: expected at least 1, got 0"):
        prefill(model, torch.zeros(1, 3, dtype=torch.int64), DynamicCache(), 0)


@pytest.mark.parametrize(
    "tokens, steps",
    [
        (0, []),
        (1, [1]),
        (2560, [2560]),
        (2561, [2048, 513]),
        (4097, [2048, 2049]),
        (32768, [2048] * 16),
    ],
)
def test_the_last_step_takes_up_a_short_rest(tokens, steps):
    assert prefill_steps(tokens) == steps
