"""The early exit in the engine: tokens, drafts and log-probabilities as without it, fewer rows computed."""

from __future__ import annotations

import pytest
import torch

from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams

ROOMY = {"max_num_seqs": 3, "max_model_len": 320}
SETTINGS = {
    "whole prompts": ROOMY,
    "chunks": ROOMY | {"max_num_batched_tokens": 23},
    "chunks and reuse off": ROOMY | {"max_num_batched_tokens": 70, "prefix_cache": False},
    "preempted": ROOMY | {"num_pages": 5, "max_num_batched_tokens": 90},
}
FORMS = {
    "plain": {},
    "heads": {"heads": 3},
    "blocks and windows in sparse layers": {
        "heads": 1, "sparse_local": "gated", "sparse_select": "block", "sparse_block_size": 8,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(drafting_model):
    return drafting_model("hysparse2-tiny", heads=3, noise=0.25, strength=0.1, mtp_intermediate_size=48)


def rows_through(module):
    """A list that gets the number of rows of each of the module's calls."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def watched(llm, rounds, count):
    """Tokens, and the drafts after every step."""
    drafts, outputs = [], []
    for prompts in rounds:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        requests = [llm.add(prompt, params) for prompt in prompts]
        while llm.has_work:
            drafts += [(r.request_id, len(r.tokens), list(r.drafts)) for r in llm.step()]
        outputs += [request.output().outputs[0].token_ids for request in requests]
    return outputs, drafts


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_and_drafts_are_those_of_the_full_forward(form, settings, random_model, make_prompts):
    """Lengths around pages, windows and branches; caches hold NaN wherever nothing has been written.

    Random heads guess badly, but every row they read shows in what they guess.
    """
    model = random_model("hysparse2-tiny", mtp_intermediate_size=48, **form)
    heads = model.num_mtp_heads
    start, a, b = make_prompts([190, 60, 5])
    rounds = [
        [start + a, b, start[:131]],
        [start + b, start[:64], start[:62], start[:194]],
        [start + a + b, a[:8], a],
    ]
    found = []
    for is_on in (False, True):
        llm = LLM(model, draft="mtp" if heads else "none", prefill_exit=is_on, **settings)
        assert (llm.runner.early_exit is not None) == is_on
        for pool in llm.cache.pools.values():
            pool.k_RKH.fill_(torch.nan)
            pool.v_RKV.fill_(torch.nan)
        found.append((watched(llm, rounds, 9), llm.stats()["preemptions"], llm.stats()["prefix"]))
    assert found[0] == found[1]
    assert bool(found[1][1]) == ("num_pages" in settings)
    assert (settings.get("prefix_cache") is False) or found[1][2]["hit_tokens"] > 200


@pytest.mark.parametrize("draft", ["none", "mtp"])
def test_the_second_half_computes_few_rows(model, draft, make_prompts, greedy):
    prompts = make_prompts([250, 33])
    counts, heads = {}, {}
    for is_on in (False, True):
        llm = LLM(
            model, draft=draft, prefill_exit=is_on, prefix_cache=False, max_num_batched_tokens=100,
            step="torch",
        )  # fmt: skip
        hooks = [rows_through(model.model.layers[i].self_attn.q_proj) for i in (0, 1, 3, 7)]
        head = rows_through(model.mtp_heads()[0].self_attn.q_proj)
        llm.generate(prompts, greedy(2))
        # Steps that read; decoding adds the same everywhere.
        counts[is_on] = [sum(seen[:3]) for seen in hooks]
        heads[is_on] = sum(head)
        for module in (model.mtp_heads()[0], *(model.model.layers[i] for i in (0, 1, 3, 7))):
            module.self_attn.q_proj._forward_pre_hooks.clear()
    assert counts[False] == [283] * 4
    # 250 and 33 tokens come in chunks of 100, 100, 50 and 33: four times one row, or with three heads of
    # window 8 four times 1 + 7 + 6; the source's own queries are 7 more.
    wanted = 4 * (1 if draft == "none" else 14)
    assert counts[True] == [283, wanted + 4 * 7, wanted, wanted]
    assert heads[True] < heads[False] / 3 if draft == "mtp" else heads[False] == 0


def test_prompt_logprobs_need_every_row_of_their_request_alone(model, make_prompts):
    long, other = make_prompts([120, 90])
    params = [
        SamplingParams(temperature=0, max_tokens=4, logprobs=0, prompt_logprobs=0),
        SamplingParams(temperature=0, max_tokens=4, logprobs=0),
    ]
    plain, early = (
        LLM(model, prefill_exit=is_on, max_num_seqs=2).generate([long, other], params)
        for is_on in (False, True)
    )
    for a, b in zip(plain, early, strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        assert a.outputs[0].token_logprobs == pytest.approx(b.outputs[0].token_logprobs, abs=1e-5)
    scores = LLM(model, prefill_exit=True).score([long])[0]
    got = [next(iter(entry.values())).logprob for entry in early[0].prompt_logprobs[1:]]
    assert got == pytest.approx(scores, abs=1e-5)


def test_it_is_off_where_it_would_change_something(model, hysparse):
    assert LLM(model).runner.early_exit is not None
    assert LLM(model, kv_cache_dtype="int8").runner.early_exit is None
    assert LLM(model, record_routing=True).runner.early_exit is None
    assert LLM(hysparse).runner.early_exit is None
