"""Both engines on the bundled pair: token ids, log-probabilities of the model, seeds, and new weights."""

import dataclasses
import json
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import GAP, tiny_model, tiny_settings
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from onpolicy_skd.data.prompts import load_prompts
from onpolicy_skd.distributed.weight_transfer import Sender, WeightSpec, fill
from onpolicy_skd.models.batch import collate
from onpolicy_skd.models.lm_head import row_statistics
from onpolicy_skd.models.loading import load_model, load_tokenizer, resolve_path
from onpolicy_skd.models.split_model import split
from onpolicy_skd.rollout.build import build_engine
from onpolicy_skd.rollout.transformers_engine import TransformersEngine, _project, sample_inverse_cdf
from onpolicy_skd.rollout.vllm_engine import VLLMEngine
from onpolicy_skd.types import RolloutRequest, SamplingParams

SAMPLED = SamplingParams(max_tokens=128)
GREEDY = SamplingParams(max_tokens=128, temperature=0.0)
STUDENT, TEACHER = "bundled:demo_student", "bundled:demo_teacher"  # with a tied and an untied head


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
    split_model = split(model, 512)
    batch = collate(trajectories, 0)
    with torch.no_grad():
        logprob = row_statistics(split_model.hidden(batch), split_model.head_VH, batch.targets).raw_logprob_N
    return (torch.as_tensor(np.concatenate([t.sampler_logprobs for t in trajectories])) - logprob).abs().mean().item()


def same(first, second):
    return [(a.response_ids.tolist(), a.finish_reason) for a in first] == [
        (b.response_ids.tolist(), b.finish_reason) for b in second
    ]


def test_log_probabilities_are_the_models_at_any_sampling_temperature(engine, requests):
    model = load_model(STUDENT, torch.float32, "cpu")
    for sampling in (SAMPLED, GREEDY, SamplingParams(128, 0.7, 0.9)):
        assert learner_gap(engine.generate(requests, sampling), model) < GAP


def test_a_response_takes_over_the_teachers_prompt(engine, requests):
    asked = [dataclasses.replace(r, teacher_prompt_ids=[5, 6 + i]) for i, r in enumerate(requests[:2])] + requests[2:3]
    trajectories = engine.generate(asked, SamplingParams(4))
    assert [t.teacher_prompt_ids.tolist() for t in trajectories[:2]] == [[5, 6], [5, 7]]
    assert trajectories[2].teacher_prompt_ids is None
    assert [t.prompt_ids.tolist() for t in trajectories] == [r.prompt_ids for r in asked]


def test_an_engine_may_share_the_weights_that_are_trained(requests):
    settings = tiny_settings(rollout={"engine": "transformers"})
    model = load_model(STUDENT, torch.float32, "cpu").train()
    shared, separate = (TransformersEngine(STUDENT, settings, shared=s) for s in (split(model, 512), None))
    assert same(shared.generate(requests, SAMPLED), separate.generate(requests, SAMPLED))
    assert model.training
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()  # despite what generation cached
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad)
    shared.load_weights((), 7)
    changed = shared.generate(requests, SAMPLED)
    assert not same(changed, separate.generate(requests, SAMPLED))
    assert {t.policy_version for t in changed} == {7}


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY, SamplingParams(128, 0.7, 0.9)])
def test_entropies_are_recorded_at_temperature_1_and_change_nothing(engine, requests, sampling):
    model = split(load_model(STUDENT, torch.float32, "cpu"), 512)
    trajectories = engine.generate(requests, dataclasses.replace(sampling, entropy=True))
    assert same(trajectories, engine.generate(requests, sampling))
    for t in trajectories:
        batch = collate([t], 0)
        with torch.no_grad():
            expected = row_statistics(model.hidden(batch), model.head_VH, batch.targets).entropy_N
        assert t.sampler_entropy.dtype == np.float32
        assert np.abs(t.sampler_entropy - expected.numpy()).max() < 10 * GAP
    assert all(t.sampler_entropy is None for t in engine.generate(requests[:2], sampling))


def test_a_request_gives_the_same_response_in_any_batch(engine, requests):
    trajectories = engine.generate(requests, SAMPLED)
    assert same(engine.generate(requests[5:9], SAMPLED), trajectories[5:9])
    assert same(engine.generate(requests[::-1], SAMPLED), trajectories[::-1])
    other = [dataclasses.replace(r, seed=r.seed + 1000) for r in requests]
    assert not same(engine.generate(other, SAMPLED), trajectories)


def test_stream_yields_responses_as_they_complete(engine, requests):
    streamed = list(engine.stream(requests, SAMPLED))
    lengths = [len(t.response_ids) for t in streamed]
    assert lengths != sorted(lengths, reverse=True)
    assert np.mean(lengths[:6]) < np.mean(lengths[-6:])  # short ones first
    by_key = {t.key: t for t in streamed}
    assert same([by_key[r.key] for r in requests], engine.generate(requests, SAMPLED))


HOSTILE = [
    {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
    {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}, {"suppress_tokens": [5, 40]},
    {"begin_suppress_tokens": [5, 40]}, {"bad_words_ids": [[40]]}, {"num_beams": 3}, {"stop_strings": ["1"]},
    {"forced_eos_token_id": 5, "max_length": 9}, {"forced_bos_token_id": 5}, {"min_new_tokens": 100},
    {"guidance_scale": 1.5}, {"watermarking_config": {"bias": 5.0}}, {"cache_implementation": "static"},
    {"typical_p": 0.5, "do_sample": True}, {"min_p": 0.3}, {"epsilon_cutoff": 0.1}, {"eta_cutoff": 0.1},
    {"penalty_alpha": 0.6, "top_k": 4}, {"encoder_repetition_penalty": 1.5}, {"sequence_bias": [[[40], -9.0]]},
    {"exponential_decay_length_penalty": [3, 1.5]}, {"renormalize_logits": True},
    {"num_return_sequences": 2, "do_sample": True}, {"prompt_lookup_num_tokens": 3}, {"max_time": 0.001},
    {"return_dict_in_generate": False}, {"use_cache": False},
]  # fmt: skip


def checkpoint_with(folder, generation_settings):
    """The bundled student with ``generation_settings`` and a second end token in its generation_config.json."""
    shutil.copytree(resolve_path(STUDENT), folder)
    (folder / "generation_config.json").write_text(json.dumps(generation_settings | {"eos_token_id": [1, 77]}))
    return str(folder)


@pytest.fixture(scope="module")
def plain_responses(requests, tmp_path_factory):
    """Responses, sampled and greedy, of a checkpoint whose generation settings are its end tokens alone."""
    engine = build_engine(checkpoint_with(tmp_path_factory.mktemp("plain") / "model", {}), SETTINGS["transformers"])
    return [engine.generate(requests[:8], sampling) for sampling in (SAMPLED, GREEDY)]


SETTINGS = {name: tiny_settings(rollout={"engine": name}) for name in ("transformers", "vllm")}


@pytest.mark.parametrize(
    "hostile", [*HOSTILE[:2], *(pytest.param(h, marks=pytest.mark.slow) for h in HOSTILE[2:])], ids="+".join
)
def test_only_end_tokens_of_a_checkpoints_generation_settings_count(hostile, requests, plain_responses, tmp_path):
    model = checkpoint_with(tmp_path / "model", hostile)
    engine = build_engine(model, SETTINGS["transformers"])
    before = engine._model.generation_config
    for sampling, expected in zip((SAMPLED, GREEDY), plain_responses, strict=True):
        responses = engine.generate(requests[:8], sampling)
        assert same(responses, expected)
        assert learner_gap(responses, engine._model) < GAP
    assert engine._model.generation_config is before  # a shared model's is saved with its checkpoint


@pytest.mark.slow
def test_vllm_takes_only_the_end_tokens_of_a_checkpoints_generation_settings(requests, plain_responses, tmp_path):
    everything = HOSTILE[0] | {"no_repeat_ngram_size": 3, "suppress_tokens": [5, 40], "max_new_tokens": 2, "min_p": 0.3}
    engine = build_engine(checkpoint_with(tmp_path / "model", everything), SETTINGS["vllm"])
    assert same(engine.generate(requests[:8], GREEDY), plain_responses[1])
    sampled = engine.generate(requests, SAMPLED)
    assert learner_gap(sampled, load_model(STUDENT, torch.float32, "cpu")) < GAP
    assert max(len(t.response_ids) for t in sampled) > 2


def test_a_stream_left_midway_leaves_nothing_behind(engine, requests):
    expected = engine.generate(requests, SAMPLED)
    sampling = dataclasses.replace(SAMPLED, entropy=True)
    stream = engine.stream(requests, sampling)
    next(stream)
    stream.close()
    later = [dataclasses.replace(r, key=f"later/{r.key}") for r in requests[4:8]]
    assert same(engine.generate(later, sampling), expected[4:8])
    if isinstance(engine, VLLMEngine):
        assert not engine._llm.llm_engine.has_unfinished_requests()
        assert entropies_left() == {}


def entropies_left():
    """Entropies that vLLM's worker, in this process, has recorded and nobody has taken."""
    from onpolicy_skd.rollout import vllm_worker

    return vllm_worker.ENTROPIES


@pytest.mark.slow
def test_the_timeout_of_a_broadcast_follows_the_settings():
    """A learner that sends nothing: the engine gives up after faults.deadline_minutes, not after ten minutes."""
    settings = tiny_settings(
        rollout={"engine": "vllm"}, sync={"method": "broadcast"}, faults={"deadline_minutes": 0.05}
    )
    engine, sender = build_engine(STUDENT, settings), Sender("127.0.0.1", "cpu")
    with ThreadPoolExecutor() as others:
        joined = others.submit(sender.init_process_group, 2, 60)
        engine.init_weight_transfer(sender.address, 1, 2)
        joined.result()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
        engine.receive(WeightSpec.of([("model.norm.weight", torch.float32, (96,))]), 1)
    assert time.monotonic() - start < 60


def test_a_sender_on_gpus_holds_its_port_from_the_start():
    sender = Sender("127.0.0.1", "cuda")  # which needs no GPU yet
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(sender.address)
    socket.create_connection(sender.address, timeout=5).close()


def test_ids_end_to_end(engine, requests):
    tokenizer = load_tokenizer(STUDENT)
    for asked, t in zip(requests, engine.generate(requests, SAMPLED), strict=True):
        assert t.key == asked.key
        assert t.prompt_ids.tolist() == asked.prompt_ids
        assert len(t.sampler_logprobs) == len(t.response_ids)
        assert t.finish_reason == "stop"
        assert t.response_ids[-1] == tokenizer.eos_token_id  # the end token belongs to the response, once
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


@pytest.mark.parametrize(
    "start", [pytest.param(STUDENT, id="tied"), pytest.param(TEACHER, id="untied", marks=pytest.mark.slow)]
)
def test_new_weights_are_sampled_from_at_once(engine, start, requests):
    """Every parameter moves, the tied embedding too; afterwards the engine agrees with the moved model."""
    model = load_model(start, torch.float32, "cpu")
    if start != STUDENT:
        engine = build_engine(start, SETTINGS["vllm" if isinstance(engine, VLLMEngine) else "transformers"])
    before = [(n, p.detach().clone()) for n, p in model.named_parameters()]
    expected = engine.generate(requests, SAMPLED)  # fills a prefix cache with entries of the old weights
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.abs().mean() * torch.randn_like(parameter))
    engine.load_weights([(n, p.detach()) for n, p in model.named_parameters()], version=7)
    trajectories = engine.generate(requests, SAMPLED)
    assert learner_gap(trajectories, model) < GAP
    assert {t.policy_version for t in trajectories} == {7}
    engine.load_weights(before, version=0)  # other tests share the engine
    assert same(engine.generate(requests, SAMPLED), expected)


def test_a_colocated_engine_frees_its_memory_and_wakes_in_two_steps():
    """The weights wake first; the cache, which needs the memory that the transfer uses, wakes last."""
    log = []

    class LLM:
        def __getattr__(self, name):
            return lambda *given, **named: not log.append(f"{name}{[*given[0]] if given and name == 'wake_up' else ''}")

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
    """Tensor parallel, in worker processes; weights as objects and by broadcast."""
    model = tiny_model("qwen3", True, vocabulary=512, hidden=64)
    model.save_pretrained(tmp_path)
    load_tokenizer(STUDENT).save_pretrained(tmp_path)
    cfg = {"tensor_parallel": 2, "entropy": "engine", "max_tokens": 24}
    engine = build_engine(str(tmp_path), tiny_settings(rollout=cfg, sync={"method": "broadcast"}))
    sampling = SamplingParams(max_tokens=24, entropy=True)
    sender = Sender("127.0.0.1", "cpu")
    for version in range(3):
        trajectories = engine.generate(requests, sampling)
        assert learner_gap(trajectories, model) < GAP
        assert {t.policy_version for t in trajectories} == {version}
        split_model, batch = split(model, 512), collate(trajectories, 0)
        with torch.no_grad():
            expected = row_statistics(split_model.hidden(batch), split_model.head_VH, batch.targets).entropy_N
        assert np.abs(np.concatenate([t.sampler_entropy for t in trajectories]) - expected.numpy()).max() < 10 * GAP
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        weights = [(n, p.detach()) for n, p in model.named_parameters()]
        if version == 0:
            engine.load_weights(weights, 1)
            continue
        with ThreadPoolExecutor() as others:
            if version == 1:
                joined = others.submit(sender.init_process_group, 3, 60)
                engine.init_weight_transfer(sender.address, 1, 3)
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
def test_the_inverse_cdf_equals_that_of_the_full_sum(seed, classes, empty):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.rand(6, classes, generator=rng) ** 4
    weight[torch.rand(6, classes, generator=rng) < empty] = 0.0
    weight[:, classes // 2] += 0.1
    uniform = torch.rand(6, generator=rng, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, np.nextafter(1.0, 0.0)
    running = weight.double().cumsum(-1)
    expected = torch.searchsorted(running, (uniform * running[:, -1])[:, None], right=True)[:, 0]
    sampled = sample_inverse_cdf(weight, uniform)
    assert (weight.gather(1, sampled[:, None]) > 0).all()  # never a class without weight
    assert torch.equal(sampled[:1], expected[:1])
    assert torch.equal(sampled[2:], expected[2:])


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 15, 16])
def test_the_head_of_a_few_rows_is_the_same_product(rows):
    head, hidden = torch.nn.Linear(16, 700, bias=False), torch.randn(rows, 1, 16)
    assert torch.allclose(_project(head, hidden), head(hidden), atol=1e-6)


def test_greedy_answers_are_those_of_a_plain_transformers_engine(engine, requests):
    expected = build_engine(STUDENT, SETTINGS["transformers"]).generate(requests, GREEDY)
    assert same(engine.generate(requests, GREEDY), expected)


def test_vllm_unpacks_the_buffer_that_the_learner_fills():
    from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

    named = [("a", torch.randn(3, 4).bfloat16()), ("b", torch.randn(5).bfloat16())]
    spec = WeightSpec.of((n, t.dtype, t.shape) for n, t in named)
    buffer = torch.empty(sum(spec.sizes), dtype=torch.uint8)
    fill(buffer, iter(named))
    for (name, actual), (expected, sent) in zip(
        unpack_tensor(buffer, spec.names, spec.shapes, [torch.bfloat16] * 2, spec.sizes), named, strict=True
    ):
        assert name == expected
        assert torch.equal(actual, sent)
