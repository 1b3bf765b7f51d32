"""The Python API end to end on a small model with random weights."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import types

import numpy as np
import pytest

from step3_jax.checkpoint.save import save_model
from step3_jax.engine.config import EngineConfig
from step3_jax.engine.llm import LLM
from step3_jax.engine.loading import end_tokens, load_executor
from step3_jax.engine.request import CompletionOutput, Logprob, RequestOutput, StreamPiece
from step3_jax.engine.runner import Runner
from step3_jax.engine.state import PrefillBatch
from step3_jax.model.step3 import Step3
from step3_jax.sampling.params import SamplingParams
from step3_jax.text.tokenizer import Tokenizer

BOS, EOT = 256, 257
PROMPTS = [[1, 2, 3], [4, 9, 33, 7, 8], list(range(10, 40)), [77]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=3, max_tokens=12, logprobs=3)
# Any of these in a batch selects one program, which has every control.
MIXED = [
    SamplingParams(temperature=0, max_tokens=5, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=11, top_p=0.8, presence_penalty=1.5, frequency_penalty=0.2, max_tokens=12),
    SamplingParams(temperature=1.2, seed=12, min_p=0.01, repetition_penalty=1.3, min_tokens=8, max_tokens=10),
    SamplingParams(
        temperature=0.7, seed=13, top_k=5, logit_bias={65: 4.0, EOT: 3.0}, stop_token_ids=[66], max_tokens=9
    ),
]


def only(outputs: list[RequestOutput]) -> CompletionOutput:
    assert len(outputs) == 1
    return outputs[0].outputs[0]


def ids(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in outputs]


def check_same_logprobs(found: tuple[dict[int, Logprob], ...], want: tuple[dict[int, Logprob], ...]) -> None:
    """Equal but for rounding: as rows end, a batch shrinks, at other steps when it is streamed."""
    assert [list(record) for record in found] == [list(record) for record in want]
    for mine, other in zip(found, want, strict=True):
        for token, logprob in mine.items():
            assert (logprob.rank, logprob.decoded_token) == (other[token].rank, other[token].decoded_token)
            assert logprob.logprob == pytest.approx(other[token].logprob, abs=1e-5)


def test_greedy_output_is_the_argmax_of_the_model_without_cache(llm: LLM, whole_logits) -> None:
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True):
        made = output.outputs[0].token_ids
        row = [*prompt, *made]
        logits = whole_logits(row)
        assert made == tuple(logits.argmax(-1)[len(prompt) - 1 : len(row) - 1].tolist())
        assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "seeded"])
def test_a_batch_gives_each_prompt_what_it_gets_alone(llm: LLM, params: SamplingParams) -> None:
    together = llm.generate(PROMPTS, params)
    assert ids(together) == [ids(llm.generate(prompt, params))[0] for prompt in PROMPTS]
    assert ids(together) == ids(llm.generate(PROMPTS, params))


def test_different_parameters_in_one_batch_give_what_they_give_alone(llm: LLM) -> None:
    together = llm.generate(PROMPTS, MIXED)
    for index in (1, 3):
        alone = only(llm.generate(PROMPTS[index], MIXED[index]))
        assert together[index].outputs[0].token_ids == alone.token_ids
        assert together[index].outputs[0].finish_reason == alone.finish_reason
    assert ids(together)[0] == ids(llm.generate(PROMPTS[0], GREEDY))[0][:5]


def test_requests_without_a_seed_are_those_of_the_models_seed(runner: Runner) -> None:
    free = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    first, second, other = (LLM.from_model(runner, seed=seed) for seed in (5, 5, None))
    made = ids(first.generate(PROMPTS, free))
    assert made == ids(second.generate(PROMPTS, free))
    assert made != ids(first.generate(PROMPTS, free))
    assert made != ids(other.generate(PROMPTS, free))


def test_n_completions_differ_and_the_first_is_that_of_n_1(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=12, ignore_eos=True)
    several = SamplingParams(temperature=1.0, seed=4, max_tokens=12, ignore_eos=True, n=3)
    [output] = llm.generate([5, 6, 7], several)
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert len({one.token_ids for one in output.outputs}) == 3
    assert output.outputs[0].token_ids == only(llm.generate([5, 6, 7], params)).token_ids
    assert output.metrics.num_generated_tokens == 36


def testend_tokens_end_and_are_left_out(llm: LLM) -> None:
    def forced(token: int, **values: object) -> SamplingParams:
        return SamplingParams(temperature=0, logit_bias={token: 100}, max_tokens=5, **values)

    params = [
        forced(EOT),
        forced(EOT, min_tokens=3),
        forced(EOT, ignore_eos=True),
        forced(65, stop_token_ids=[65]),
    ]
    first, late, ignored, named = (output.outputs[0] for output in llm.generate([[1]] * 4, params))
    assert (first.token_ids, first.text, first.finish_reason, first.stop_reason) == ((), "", "stop", None)
    assert len(late.token_ids) == 3
    assert EOT not in late.token_ids
    assert (late.finish_reason, late.stop_reason) == ("stop", None)
    assert (ignored.token_ids, ignored.finish_reason) == ((EOT,) * 5, "length")
    assert (named.token_ids, named.finish_reason, named.stop_reason) == ((), "stop", 65)


def test_a_stop_string_cuts_the_text_and_the_tokens(llm: LLM) -> None:
    # Only letters, so that the text can be cut anywhere.
    letters = dict.fromkeys(range(97, 107), 40.0)
    params = {"temperature": 1.0, "seed": 2, "max_tokens": 40, "logit_bias": letters}
    whole = only(llm.generate("go", SamplingParams(**params)))
    stop = whole.text[6:9]
    place = whole.text.index(stop)
    cut = only(llm.generate("go", SamplingParams(**params, stop=["never", stop])))
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole.text[:place], "stop", stop)
    assert cut.token_ids == whole.token_ids[: place + 3]
    kept = only(llm.generate("go", SamplingParams(**params, stop=stop, include_stop_str_in_output=True)))
    assert kept.text == whole.text[: place + 3]
    other = only(llm.generate("go", SamplingParams(**params, stop="XYZ")))
    assert (other.text, other.finish_reason) == (whole.text, "length")


def test_pieces_of_a_stream_are_the_whole_output(llm: LLM) -> None:
    # Random bytes: most characters are broken, and some need more than one token.
    params = [
        SamplingParams(temperature=1.5, seed=seed, max_tokens=30, n=2, logprobs=2, stop=["a", "\ufffd\ufffd"][seed:])
        for seed in range(2)
    ]
    prompts = ["ab", "c"]
    whole = llm.generate(prompts, params)
    pieces = list(llm.generate(prompts, params, stream=True))
    assert len(pieces) > 6
    for output in whole:
        for one in output.outputs:
            own = [piece for piece in pieces if (piece.index, piece.completion) == (output.index, one.index)]
            assert "".join(piece.text for piece in own) == one.text
            assert sum((piece.token_ids for piece in own), ()) == one.token_ids
            check_same_logprobs(sum((piece.logprobs for piece in own), ()), one.logprobs)
            assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + [one.finish_reason]
            assert own[-1].stop_reason == one.stop_reason


def test_a_stream_brings_the_first_token_by_itself(llm: LLM) -> None:
    first = next(iter(llm.generate([1, 2], GREEDY, stream=True)))
    assert isinstance(first, StreamPiece)
    assert len(first.token_ids) == 1


def test_streamed_errors_come_before_the_first_piece(llm: LLM) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        llm.generate([[1], []], stream=True)


def test_logprobs_are_of_each_token_and_sum_up(llm: LLM, whole_logits) -> None:
    [output] = llm.generate([1, 2, 3], DRAWN)
    one = output.outputs[0]
    row = [1, 2, 3, *one.token_ids]
    logits = whole_logits(row)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert len(one.logprobs) == len(one.token_ids)
    total = 0.0
    for step, (token, record) in enumerate(zip(one.token_ids, one.logprobs, strict=True)):
        want = logprobs[2 + step]
        assert record[token].logprob == pytest.approx(want[token], abs=1e-4)
        assert set(np.argsort(-want)[:3].tolist()) <= set(record)
        assert record[token].rank == 1 + int((want > want[token]).sum())
        total += record[token].logprob
    assert one.cumulative_logprob == pytest.approx(total)
    assert only(llm.generate([1, 2, 3], GREEDY)).logprobs is None


def test_text_prompts_begin_with_the_begin_token_once(llm: LLM) -> None:
    for prompt in ("hi", "<bos>hi", {"prompt": "hi"}):
        [output] = llm.generate(prompt, GREEDY)
        assert output.prompt_token_ids == (BOS, 104, 105)
    [output] = llm.generate({"prompt_token_ids": [104, 105]}, GREEDY)
    assert (output.prompt, output.prompt_token_ids) == (None, (104, 105))


def test_chat_applies_the_template_and_keeps_typed_control_tokens_as_text(llm: LLM) -> None:
    outputs = llm.chat([[{"role": "user", "content": text}] for text in ("a", "<eot>", "b", "c")], GREEDY)
    assert outputs[0].prompt == "<bos>user: a\nassistant: "
    assert outputs[0].prompt_token_ids[0] == BOS
    assert EOT not in outputs[1].prompt_token_ids
    single = llm.chat([{"role": "user", "content": "a"}], GREEDY)
    assert ids(single) == ids(outputs)[:1]


def test_defaults_come_from_the_generation_config(runner: Runner) -> None:
    made = ids(LLM.from_model(runner).generate([1, 2, 3], GREEDY))[0]
    llm = LLM.from_model(runner, generation_config={"temperature": 0.0, "max_new_tokens": 3, "eos_token_id": [0]})
    output = only(llm.generate([1, 2, 3]))
    assert (output.token_ids, output.finish_reason) == (made[:3], "length")
    llm = LLM.from_model(runner, generation_config={"temperature": 0.0, "eos_token_id": [0, made[2]]})
    output = only(llm.generate([1, 2, 3]))
    assert (output.token_ids, output.finish_reason) == (made[: made.index(made[2])], "stop")
    with pytest.raises(ValueError, match="eos_token_id is 'x'"):
        LLM.from_model(runner, generation_config={"eos_token_id": "x"})


def test_the_tokenizer_names_the_end_token_where_no_other_file_does() -> None:
    tokenizer = types.SimpleNamespace(eos_ids=(7,))
    assert end_tokens(None, (), tokenizer) == (7,)
    assert end_tokens(None, (), None) == ()
    assert end_tokens(None, (5,), tokenizer) == (5,)
    assert end_tokens([3, 4], (5,), tokenizer) == (3, 4)


def test_without_a_tokenizer_ids_work_and_text_is_refused(runner: Runner, llm: LLM) -> None:
    bare = LLM.from_model(runner)
    output = only(bare.generate([1, 2, 3], GREEDY))
    assert output.text == ""
    assert output.token_ids == only(llm.generate([1, 2, 3], GREEDY)).token_ids
    with pytest.raises(ValueError, match=r"no tokenizer.json"):
        bare.generate("hello")
    with pytest.raises(ValueError, match="need a tokenizer"):
        bare.generate([1], SamplingParams(stop="a"))
    with pytest.raises(ValueError, match=r"no tokenizer.json"):
        bare.chat([{"role": "user", "content": "a"}])


def test_the_whole_context_can_be_filled(runner: Runner) -> None:
    llm = LLM.from_model(runner, max_model_len=40)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    output = only(llm.generate(list(range(37)), params))
    assert (len(output.token_ids), output.finish_reason) == (3, "length")
    assert len(only(llm.generate(list(range(39)), params)).token_ids) == 1


def test_what_does_not_fit_is_refused_with_the_numbers(llm: LLM, runner: Runner) -> None:
    with pytest.raises(ValueError, match=r"250 tokens and 16 more are asked for, together 266; at most .* 256"):
        llm.generate([list(range(250))], SamplingParams(min_tokens=16))
    with pytest.raises(ValueError, match="max_model_len is 300"):
        LLM.from_model(runner, max_model_len=300)
    with pytest.raises(ValueError, match=r"token ids \[264\]; allowed: 0 to 263"):
        llm.generate([1, 264])
    with pytest.raises(ValueError, match=r"logit_bias has token ids \[900\]"):
        llm.generate([1], SamplingParams(logit_bias={900: 1}))
    with pytest.raises(ValueError, match="2 sampling_params are given for 1 prompt"):
        llm.generate([1], [SamplingParams(), SamplingParams()])
    for name in ("max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            LLM.from_model(runner, **{name: 0})
    with pytest.raises(ValueError, match=r"kv_cache_dtype is 'fp4'; allowed: auto, float32"):
        LLM.from_model(runner, kv_cache_dtype="fp4")
    with pytest.raises(ValueError, match=r"int4.* multiple of 64; it is 16"):
        LLM.from_model(runner, kv_cache_dtype="int4")
    with pytest.raises(ValueError, match=r"one sequence of max_model_len = 256 .* lower max_model_len"):
        LLM.from_model(runner, kv_cache_memory_bytes=1000)


def test_max_tokens_is_a_bound_where_the_context_is_shorter(llm: LLM) -> None:
    output = only(llm.generate(list(range(250)), SamplingParams(temperature=0, max_tokens=2048, ignore_eos=True)))
    assert (len(output.token_ids), output.finish_reason) == (6, "length")


def test_a_prompt_that_cannot_be_used_is_named_and_the_others_are_answered(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    outputs = llm.generate([[1, 2, 3], list(range(256)), [], [77]], GREEDY)
    assert [output.error is None for output in outputs] == [True, False, False, True]
    assert outputs[1].error.startswith("prompt 1 of 4: the prompt has 256 tokens and 1 more")
    assert outputs[2].error.startswith("prompt 2 of 4: the prompt has no tokens")
    assert (outputs[2].outputs[0].finish_reason, outputs[2].outputs[0].token_ids) == ("error", ())
    assert ids([outputs[0], outputs[3]]) == ids(llm.generate([[1, 2, 3], [77]], GREEDY))
    assert "prompt 2 of 4" in caplog.text
    with pytest.raises(ValueError, match="prompt 0 of 2: the prompt has no tokens"):
        llm.generate([[], []], GREEDY)


def test_requests_have_ids_of_their_own_and_the_tokenizer_is_at_hand(llm: LLM, runner: Runner) -> None:
    outputs = llm.generate([[1], [2], [3]], GREEDY) + llm.generate([[4]], GREEDY, use_tqdm=False)
    assert len({output.request_id for output in outputs}) == 4
    assert llm.get_tokenizer() is llm.tokenizer
    with pytest.raises(ValueError, match=r"no tokenizer.json"):
        LLM.from_model(runner).get_tokenizer()


def test_a_context_that_the_model_lacks_is_refused_before_weights_are_read(
    model: Step3, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model, tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("step3_jax.engine.loading.load_model", fail)
    with pytest.raises(ValueError, match=r"max_model_len is 300; .* has positions for at most 256 tokens"):
        LLM(tmp_path, max_model_len=300)


def test_the_devices_say_in_which_dtype_weights_are_read_not_the_default_backend(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: list[object] = []

    def stop(_: pathlib.Path, dtype: object, **__: object) -> None:
        dtypes.append(dtype)
        raise InterruptedError

    monkeypatch.setattr("step3_jax.engine.loading.load_model", stop)
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    with pytest.raises(InterruptedError):
        load_executor(tmp_path, EngineConfig(), None, None)
    assert dtypes == [np.dtype("float32")]


def test_an_unknown_setting_is_named_with_the_nearest_one(runner: Runner, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="there is no setting 'max_num_seq'; did you mean max_num_seqs"):
        LLM.from_model(runner, max_num_seq=3)
    with pytest.raises(ValueError, match="there is no setting 'max_batch_size'; did you mean max_num_seqs"):
        LLM(model=tmp_path, max_batch_size=3)


def test_threads_get_each_its_own_answers(runner: Runner, llm: LLM) -> None:
    """Eight threads with calls of different lengths, plain and streamed, on one engine."""
    shared = LLM.from_model(runner, stream_interval=2)
    cases = [(PROMPTS[index % 4], 3 + index % 7) for index in range(40)]
    want = [ids(llm.generate(prompt, dataclasses.replace(GREEDY, max_tokens=count)))[0] for prompt, count in cases]

    def ask(number: int) -> tuple[int, ...]:
        prompt, count = cases[number]
        params = dataclasses.replace(GREEDY, max_tokens=count)
        if number % 3:
            return ids(shared.generate(prompt, params, use_tqdm=False))[0]
        return sum((piece.token_ids for piece in shared.generate(prompt, params, stream=True)), ())

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(len(cases)))) == want
    core = shared._engine.core
    assert (core.has_work, core.allocator.num_free) == (False, core.allocator.num_pages)


def test_n_completions_prefill_their_prompt_once(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [7 + index % 50 for index in range(150)]
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=6, ignore_eos=True)
    llm = LLM.from_model(runner, enable_prefix_caching=False, max_num_batched_tokens=256)
    alone = only(llm.generate(prompt, params))
    prefilled = []
    prefill = Runner.prefill

    def count(self: Runner, cache: object, batch: PrefillBatch) -> object:
        prefilled.append(int(np.diff(batch.query_starts).sum()))
        return prefill(self, cache, batch)

    monkeypatch.setattr(Runner, "prefill", count)
    [output] = llm.generate(prompt, dataclasses.replace(params, n=5))
    assert sum(prefilled) == 149
    assert output.outputs[0].token_ids == alone.token_ids
    assert len({one.token_ids for one in output.outputs}) == 5
    core = llm._engine.core
    assert core.allocator.num_free == core.allocator.num_pages


def test_more_prompts_than_slots_wait_their_turn_and_come_in_order(
    runner: Runner, tokenizer: Tokenizer, llm: LLM
) -> None:
    narrow = LLM.from_model(runner, tokenizer, max_num_seqs=2)
    prompts = [PROMPTS[index % 4] for index in (2, 0, 3, 1, 2)]
    outputs = narrow.generate(prompts, GREEDY)
    assert [output.prompt_token_ids for output in outputs] == [tuple(prompt) for prompt in prompts]
    assert ids(outputs) == [ids(llm.generate(prompt, GREEDY))[0] for prompt in prompts]
    stats = narrow.stats
    assert (stats.num_requests, stats.num_generated_tokens) == (5, 60)
    assert stats.num_prompt_tokens == sum(map(len, prompts))
    assert stats.decode_tokens_per_s > 0


def test_a_saved_folder_answers_as_the_model_in_memory(model: Step3, llm: LLM, tmp_path: pathlib.Path) -> None:
    save_model(model, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.0, "max_new_tokens": 4}', encoding="utf-8")
    loaded = LLM(tmp_path, max_model_len=64)
    assert (loaded.tokenizer, loaded.max_model_len) == (None, 64)
    assert loaded.default_sampling_params.max_tokens == 4
    assert only(loaded.generate([1, 2, 3], GREEDY)).token_ids == only(llm.generate([1, 2, 3], GREEDY)).token_ids
    with pytest.raises(ValueError, match="dtype is 'float16'"):
        LLM(tmp_path, dtype="float16")
