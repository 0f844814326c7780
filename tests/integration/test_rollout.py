"""Both engines on the bundled pair: ids in, ids out, log-probabilities of the model, seeds, and new weights."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import GAP, tiny_model, tiny_settings
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from onpolicy_skd.data.prompts import load_prompts
from onpolicy_skd.distributed.weight_transfer import Sender, WeightSpec
from onpolicy_skd.models.batch import collate
from onpolicy_skd.models.lm_head import row_statistics
from onpolicy_skd.models.loading import load_model, load_tokenizer
from onpolicy_skd.models.split_model import split
from onpolicy_skd.rollout.build import build_engine
from onpolicy_skd.rollout.transformers_engine import TransformersEngine, _project, sample_inverse_cdf
from onpolicy_skd.rollout.vllm_engine import VLLMEngine
from onpolicy_skd.types import RolloutRequest, SamplingParams

SAMPLED = SamplingParams(max_tokens=128)
GREEDY = SamplingParams(max_tokens=128, temperature=0.0)
STUDENT, TEACHER = "bundled:demo_student", "bundled:demo_teacher"  # the one has a tied head, the other has not


@pytest.fixture(scope="module")
def requests():
    settings = tiny_settings()
    prompts = load_prompts(settings.data, load_tokenizer(STUDENT), "eval", 24)
    return [RolloutRequest(p.key, p.token_ids, seed) for seed, p in enumerate(prompts)]


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def engine(request):
    return build_engine(STUDENT, tiny_settings(rollout={"engine": request.param, "entropy": "engine"}))


def learner_gap(trajectories, model):
    """Mean |sampler - model| log-probability of the sampled tokens, nats."""
    whole = split(model, 512)
    batch = collate(trajectories, 0)
    with torch.no_grad():
        logprob = row_statistics(whole.hidden(batch), whole.head_VH, batch.targets).raw_logprob_N
    return (torch.as_tensor(np.concatenate([t.sampler_logprobs for t in trajectories])) - logprob).abs().mean().item()


def same(one, other):
    return [(a.response_ids.tolist(), a.finish_reason) for a in one] == [
        (b.response_ids.tolist(), b.finish_reason) for b in other
    ]


def test_log_probabilities_are_the_models_own_at_any_sampling_temperature(engine, requests):
    model = load_model(STUDENT, torch.float32, "cpu")
    for sampling in (SAMPLED, GREEDY, SamplingParams(128, 0.7, 0.9)):
        assert learner_gap(engine.generate(requests, sampling), model) < GAP


def test_an_engine_may_share_the_weights_that_are_trained(requests):
    settings = tiny_settings(rollout={"engine": "transformers"})
    model = load_model(STUDENT, torch.float32, "cpu").train()
    shared, own = (TransformersEngine(STUDENT, settings, shared=s) for s in (split(model, 512), None))
    assert same(shared.generate(requests, SAMPLED), own.generate(requests, SAMPLED))
    assert model.training
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()  # nothing it cached is in the way
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad)
    shared.load_weights((), 7)
    changed = shared.generate(requests, SAMPLED)
    assert not same(changed, own.generate(requests, SAMPLED))
    assert {t.policy_version for t in changed} == {7}


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY, SamplingParams(128, 0.7, 0.9)])
def test_entropies_are_recorded_at_temperature_1_and_change_nothing(engine, requests, sampling):
    whole = split(load_model(STUDENT, torch.float32, "cpu"), 512)
    found = engine.generate(requests, dataclasses.replace(sampling, entropy=True))
    assert same(found, engine.generate(requests, sampling))
    for t in found:
        batch = collate([t], 0)
        with torch.no_grad():
            expected = row_statistics(whole.hidden(batch), whole.head_VH, batch.targets).entropy_N
        assert t.sampler_entropy.dtype == np.float32
        assert np.abs(t.sampler_entropy - expected.numpy()).max() < 10 * GAP
    assert all(t.sampler_entropy is None for t in engine.generate(requests[:2], sampling))


def test_a_request_gives_the_same_response_in_any_batch(engine, requests):
    whole = engine.generate(requests, SAMPLED)
    assert same(engine.generate(requests[5:9], SAMPLED), whole[5:9])
    assert same(engine.generate(requests[::-1], SAMPLED), whole[::-1])
    other = [dataclasses.replace(r, seed=r.seed + 1000) for r in requests]
    assert not same(engine.generate(other, SAMPLED), whole)


def test_responses_come_as_they_end(engine, requests):
    streamed = list(engine.stream(requests, SAMPLED))
    lengths = [len(t.response_ids) for t in streamed]
    assert lengths != sorted(lengths, reverse=True)
    assert np.mean(lengths[:6]) < np.mean(lengths[-6:])  # short ones first
    by_key = {t.key: t for t in streamed}
    assert same([by_key[r.key] for r in requests], engine.generate(requests, SAMPLED))


def test_ids_end_to_end(engine, requests):
    tokenizer = load_tokenizer(STUDENT)
    for asked, t in zip(requests, engine.generate(requests, SAMPLED), strict=True):
        assert t.key == asked.key
        assert t.prompt_ids.tolist() == asked.prompt_ids
        assert len(t.sampler_logprobs) == len(t.response_ids)
        assert t.finish_reason == "stop"
        assert t.response_ids[-1] == tokenizer.eos_token_id  # the end belongs to the response, once
        assert (t.response_ids[:-1] != tokenizer.eos_token_id).all()


def test_truncated_responses_say_so_and_get_no_end(engine, requests):
    tokenizer = load_tokenizer(STUDENT)
    for t in engine.generate(requests, SamplingParams(max_tokens=5)):
        assert t.finish_reason == "length"
        assert len(t.response_ids) == 5
        assert tokenizer.eos_token_id not in t.response_ids


def test_greedy_decoding_is_the_models_argmax(engine, requests):
    model = load_model(STUDENT, torch.float32, "cpu")
    for t in engine.generate(requests[:8], GREEDY):
        ids = torch.as_tensor(np.concatenate([t.prompt_ids, t.response_ids]))[None]
        guess = model(input_ids=ids).logits[0, len(t.prompt_ids) - 1 : -1].argmax(-1)
        assert guess.tolist() == t.response_ids.tolist()


@pytest.mark.parametrize("name", ["transformers", "vllm"])
@pytest.mark.parametrize("start", [STUDENT, TEACHER], ids=["tied", "untied"])
def test_new_weights_are_sampled_from_at_once(name, start, requests):
    """Every parameter moves, the tied embedding too; afterwards the engine agrees with the moved model."""
    model = load_model(start, torch.float32, "cpu")
    fresh = build_engine(start, tiny_settings(rollout={"engine": name}))
    fresh.generate(requests, SAMPLED)  # fills a prefix cache with entries of the old weights
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.abs().mean() * torch.randn_like(parameter))
    fresh.load_weights([(n, p.detach()) for n, p in model.named_parameters()], version=7)
    trajectories = fresh.generate(requests, SAMPLED)
    assert learner_gap(trajectories, model) < GAP
    assert {t.policy_version for t in trajectories} == {7}


def test_a_colocated_engine_gives_its_memory_back_and_wakes_in_two_parts():
    """Weights first, for the new ones; the cache, which needs the room they are sent in, last."""
    log = []

    class LLM:
        def __getattr__(self, name):
            return lambda *given, **named: log.append(f"{name}{[*given[0]] if given and name == 'wake_up' else ''}")

    engine = VLLMEngine.__new__(VLLMEngine)
    engine._llm, engine._on_cpu, engine._sleeps, engine._asleep, engine.version = LLM(), False, True, False, 0
    engine.sleep()
    engine.sleep()
    assert log == ["sleep"]
    weight_spec = WeightSpec.of([("w", torch.bfloat16, (2, 3))])
    assert weight_spec.update == {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]}
    engine.receive(weight_spec, 3)
    sent = ["start_weight_update", "update_weights", "finish_weight_update"]
    assert log[1:] == ["wake_up['weights']", *sent, "wake_up['kv_cache']", "reset_prefix_cache"]
    assert engine.version == 3
    log.clear()
    engine.receive(weight_spec, 4)
    assert log == [*sent, "reset_prefix_cache"]


@pytest.mark.slow
def test_an_engine_on_two_devices_is_the_model_before_and_after_new_weights(tmp_path, requests):
    """Tensor parallel, in worker processes; weights through the object store's way and by broadcast."""
    model = tiny_model("qwen3", True, vocabulary=512, hidden=64)
    model.save_pretrained(tmp_path)
    load_tokenizer(STUDENT).save_pretrained(tmp_path)
    own = {"tensor_parallel": 2, "entropy": "engine", "max_tokens": 24}
    engine = build_engine(str(tmp_path), tiny_settings(rollout=own, sync={"method": "broadcast"}))
    sampling = SamplingParams(max_tokens=24, entropy=True)
    sender = Sender("127.0.0.1", "cpu")
    for version in range(3):
        found = engine.generate(requests, sampling)
        assert learner_gap(found, model) < GAP
        assert {t.policy_version for t in found} == {version}
        whole, batch = split(model, 512), collate(found, 0)
        with torch.no_grad():
            expected = row_statistics(whole.hidden(batch), whole.head_VH, batch.targets).entropy_N
        assert np.abs(np.concatenate([t.sampler_entropy for t in found]) - expected.numpy()).max() < 10 * GAP
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        weights = [(n, p.detach()) for n, p in model.named_parameters()]
        if version == 0:
            engine.load_weights(weights, 1)
            continue
        with ThreadPoolExecutor() as others:
            if version == 1:
                joined = others.submit(sender.join, 3, 60)
                engine.join(sender.address, 1, 3)
                joined.result()
            sent = others.submit(sender.send, weights)
            engine.receive(WeightSpec.of((n, t.dtype, t.shape) for n, t in weights), version + 1)
            sent.result()


def test_sampling_follows_the_distribution():
    """First tokens of many seeds against the model's own probabilities, by a chi-squared bound."""
    engine = TransformersEngine(STUDENT, tiny_settings(rollout={"max_sequences": 4096}))
    prompt = load_tokenizer(STUDENT)("Now Zoe has <<")["input_ids"]
    draws = 4000
    requests = [RolloutRequest(str(i), prompt, i) for i in range(draws)]
    first = np.array([t.response_ids[0] for t in engine.generate(requests, SamplingParams(1))])
    with torch.no_grad():
        q = torch.softmax(engine._model(input_ids=torch.tensor([prompt])).logits[0, -1].double(), -1).numpy()
    likely = np.flatnonzero(q * draws >= 5)
    seen = np.array([(first == i).sum() for i in likely])
    expected = q[likely] * draws
    statistic = ((seen - expected) ** 2 / expected).sum()
    freedom = len(likely)
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)
    nucleus = [t.response_ids[0] for t in engine.generate(requests[:500], SamplingParams(1, 1.0, top_p=0.5))]
    order = np.argsort(-q)
    inside = order[: int(np.searchsorted(np.cumsum(q[order]), 0.5)) + 1]
    assert set(nucleus) <= set(inside.tolist())


@given_settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([1, 3, 97, 511, 512, 513, 1025, 5_000]), st.floats(0, 0.95))
def test_the_inverse_cdf_is_that_of_the_whole_sum(seed, classes, empty):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.rand(6, classes, generator=draw) ** 4
    weight[torch.rand(6, classes, generator=draw) < empty] = 0.0
    weight[:, classes // 2] += 0.1
    uniform = torch.rand(6, generator=draw, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, np.nextafter(1.0, 0.0)
    running = weight.double().cumsum(-1)
    expected = torch.searchsorted(running, (uniform * running[:, -1])[:, None], right=True)[:, 0]
    found = sample_inverse_cdf(weight, uniform)
    assert (weight.gather(1, found[:, None]) > 0).all()  # never a class without weight
    assert torch.equal(found[:1], expected[:1])
    assert torch.equal(found[2:], expected[2:])


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 15, 16])
def test_the_head_of_a_few_rows_is_the_same_product(rows):
    head, hidden = torch.nn.Linear(16, 700, bias=False), torch.randn(rows, 1, 16)
    assert torch.allclose(_project(head, hidden), head(hidden), atol=1e-6)


def test_vllm_and_transformers_agree_greedily(requests):
    answers = [
        build_engine(STUDENT, tiny_settings(rollout={"engine": name})).generate(requests, GREEDY)
        for name in ("transformers", "vllm")
    ]
    assert same(*answers)
