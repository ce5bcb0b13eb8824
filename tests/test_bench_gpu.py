"""The benchmark for a GPU, with tiny sizes on the CPU.
python -m pytest tests/test_bench_gpu.py"""
import json

import pytest

import bench_gpu
from bench_gpu import DrySizes


@pytest.mark.parametrize("section", [bench_gpu.card, bench_gpu.correctness, bench_gpu.update,
                                     bench_gpu.log_probs, bench_gpu.requests, bench_gpu.pieces])
def test_a_section_gives_figures(section):
    figures = bench_gpu.rounded(section(DrySizes))
    assert figures and json.dumps(figures)
    if section is bench_gpu.requests:                  # every request ends where it was asked to
        assert figures["tokens"] == figures["expected_tokens"]
    if section is bench_gpu.correctness:
        assert all(x["graph_is_eager"] and x["sampler_scorer"] < 1e-5 for x in figures.values())


def test_the_requests_are_those_of_nano_vllm(monkeypatch):
    """133,966 tokens, as it prints."""
    class Sizes(DrySizes):
        requests, longest = bench_gpu.Sizes.requests, bench_gpu.Sizes.longest

    asked = {}

    def generate(model, prompts, group_size, max_new_tokens, stop_token_ids, uniform):
        ends = (uniform == 0).nonzero()
        asked["lengths"] = ends[:, 1] + 1
        assert len(ends) == len(prompts) == 256 and max_new_tokens == 1024
        return None, (ends[:, 1:] >= 0), None

    monkeypatch.setattr(bench_gpu.GPT, "generate", generate)
    assert bench_gpu.requests(Sizes)["expected_tokens"] == 133_966
    assert asked["lengths"].sum() == 133_966


@pytest.mark.slow
def test_the_whole_command_runs_without_an_error(capsys):
    bench_gpu.main(DrySizes)
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert [x["section"] for x in lines] == [x.__name__ for x in bench_gpu.SECTIONS]
    assert not any("error" in x or "skipped" in x for x in lines), lines
