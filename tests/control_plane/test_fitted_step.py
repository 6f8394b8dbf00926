"""Step times that were fitted to a server, and the profile in a file that carries them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.catalogue import GPUS, MODELS
from control_plane.engines.model import EngineModel, ModelSequence
from control_plane.errors import InvalidRequest
from control_plane.fitted_step import FittedStep, Sample, StepShape, fit, non_negative_least_squares
from control_plane.predicting.priors import prior_of
from control_plane.profile_file import ProfileFile, load
from control_plane.roofline import EngineProfile, decode_step_s, prefill_s, profile, step_s
from control_plane.sim_engine.engine import SimEngine
from control_plane.simulator.fleet_spec import parse_fleet
from control_plane.types import ExecutionInstance

TRUE = FittedStep(
    overhead_s=0.004, prefill_token_s=2.5e-5, prefill_pair_s=3e-9, decode_sequence_s=4e-5, decode_context_s=6e-9, mixed_s=0.0008
)  # fmt: skip
SHAPES = [
    StepShape(tokens, context, decodes, decode_context * max(1, decodes), sequences)
    for tokens, context, decodes, decode_context, sequences in itertools.product(
        (0, 100, 1000, 4000), (0, 3000), (0, 1, 16, 64), (0, 500, 4000), (1, 2)
    )
    if tokens or (decodes and not context and sequences == 1)
]


def told(shape: StepShape) -> dict[str, int]:
    return {
        "prefill_tokens": int(shape.prefill_tokens),
        "prefill_context_tokens": int(shape.prefill_context_tokens),
        "decode_sequences": int(shape.decode_sequences),
        "decode_context_tokens": int(shape.decode_context_tokens),
        "prefill_sequences": int(shape.prefill_sequences),
    }


# ---------------------------------------------------------------------------------------------------------------- the form


def test_a_step_is_the_sum_of_what_it_does() -> None:
    seconds = TRUE(prefill_tokens=100, prefill_context_tokens=50, decode_sequences=2, decode_context_tokens=900)
    assert seconds == pytest.approx(0.004 + 100 * 2.5e-5 + 100 * 100 * 3e-9 + 2 * 4e-5 + 900 * 6e-9 + 0.0008)
    assert TRUE(prefill_tokens=0, prefill_context_tokens=0, decode_sequences=0, decode_context_tokens=0) == 0.0


def test_the_features_are_what_the_call_reckons_with() -> None:
    names = ("overhead_s", "prefill_token_s", "prefill_pair_s", "prefill_context_s", "decode_sequence_s", "decode_context_s", "sequence_s")
    step = FittedStep(**{name: 10.0**-place for place, name in enumerate((*names, "mixed_s"))})
    for shape in SHAPES:
        by_features = sum(10.0**-place * value for place, value in enumerate(shape.features()))
        assert step(**told(shape)) == pytest.approx(by_features)


def test_a_table_is_read_between_before_and_after_its_entries() -> None:
    step = FittedStep(token_table=((10, 0.1), (20, 0.2), (40, 0.6)))

    def of(tokens: int) -> float:
        return step(prefill_tokens=tokens, prefill_context_tokens=0, decode_sequences=0, decode_context_tokens=0)

    assert [of(tokens) for tokens in (1, 10, 15, 20, 30, 40, 50)] == pytest.approx([0.1, 0.1, 0.15, 0.2, 0.4, 0.6, 0.8])
    one = FittedStep(token_table=((10, 0.1),))
    assert one(prefill_tokens=50, prefill_context_tokens=0, decode_sequences=0, decode_context_tokens=0) == 0.1


@pytest.mark.parametrize(
    "values",
    [{"overhead_s": -1.0}, {"overhead_s": float("nan")}, {"overhead_s": True}, {"mixed_s": "1"}, {"token_table": ((10, 0.2), (5, 0.3))},
     {"token_table": ((5, 0.2), (10, 0.1))}, {"token_table": 3}, {"token_table": ((1,),)}, {"token_table": ((1, -2.0),)}],
)  # fmt: skip
def test_what_is_no_time_is_refused_by_name(values: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        FittedStep(**values)  # type: ignore[arg-type]
    assert caught.value.param == next(iter(values))


# ---------------------------------------------------------------------------------------------------------------- the fit


def test_a_fit_finds_the_coefficients_that_made_the_samples() -> None:
    found = fit([Sample(TRUE(**told(shape)), [shape]) for shape in SHAPES])
    for name, value in TRUE.as_dict().items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name


def test_a_fit_bears_noise_and_never_goes_below_zero() -> None:
    rng = Random(7)
    samples = [Sample(TRUE(**told(shape)) * rng.uniform(0.95, 1.05), [shape]) for shape in SHAPES for _ in range(3)]
    found = fit(samples)
    assert found.prefill_token_s == pytest.approx(TRUE.prefill_token_s, rel=0.05)
    assert min(found.as_dict().values()) >= 0.0
    errors = [abs(found(**told(shape)) / TRUE(**told(shape)) - 1.0) for shape in SHAPES]
    assert sum(errors) / len(errors) < 0.01


def test_a_duration_of_several_steps_is_a_sample() -> None:
    """A time to first token takes several chunks; a pause between tokens seen may take several steps."""
    samples = []
    for prompt in (500, 3000, 9000):
        steps = [StepShape(min(2048, prompt - done), done) for done in range(0, prompt, 2048)]
        samples.append(Sample(sum(TRUE(**told(step)) for step in steps), steps))
    for batch, length in ((1, 100), (8, 700), (32, 2000)):
        # 50 steps whose context grows: one shape with their mean
        seconds = sum(
            TRUE(prefill_tokens=0, prefill_context_tokens=0, decode_sequences=batch, decode_context_tokens=batch * (length + k))
            for k in range(51)
        )
        samples.append(Sample(seconds, [StepShape(0, 0, batch, batch * (length + 25), repeats=51)]))
    use = ("overhead_s", "prefill_token_s", "prefill_pair_s", "decode_sequence_s", "decode_context_s")
    found = fit(samples, use=use)
    for name in use:
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name


def test_a_table_takes_what_is_not_linear_in_the_tokens() -> None:
    """Weights are read once for few tokens, and for many the multiplications count."""

    def seconds(tokens: int) -> float:
        return 0.005 + max(0.0, tokens - 256) * 2e-5

    samples = [Sample(seconds(tokens), [StepShape(tokens)]) for tokens in (1, 8, 64, 128, 256, 300, 512, 1024, 2048)]
    found = fit(samples, use=("overhead_s",), knots=(1, 256, 512, 2048))
    for tokens in (1, 100, 256, 400, 700, 2048, 4096):
        assert found(prefill_tokens=tokens, prefill_context_tokens=0, decode_sequences=0, decode_context_tokens=0) == pytest.approx(
            seconds(tokens), rel=0.01
        )


def test_what_cannot_be_fitted_is_refused() -> None:
    one = [Sample(1.0, [StepShape(1)])]
    for arguments in ({"samples": []}, {"samples": [Sample(0.0, [StepShape(1)])]}, {"samples": one, "use": ("speed",)},
                      {"samples": one, "knots": (4, 2)}, {"samples": one, "knots": (4,)}):  # fmt: skip
        with pytest.raises(InvalidRequest):
            fit(**arguments)  # type: ignore[arg-type]


@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=3, max_size=8), st.data())
def test_no_neighbour_of_the_least_squares_is_better(rows: list[list[float]], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.floats(-10, 10), min_size=len(rows), max_size=len(rows)))

    def error(x: list[float]) -> float:
        return sum((sum(a * b for a, b in zip(row, x, strict=True)) - y) ** 2 for row, y in zip(rows, wanted, strict=True))

    found = non_negative_least_squares(rows, wanted)
    assert min(found) >= 0.0
    best = error(found)
    for place in range(3):
        for change in (-0.01, 0.01):
            moved = [max(0.0, value + change * (place == i)) for i, value in enumerate(found)]
            assert error(moved) >= best - 1e-6 * (1.0 + sum(y * y for y in wanted))


# ---------------------------------------------------------------------------------------------------------------- the file

CALIBRATED = ProfileFile(
    "my-server", base="h100-llama3-8b", block_size_tokens=32, kv_block_count=1234, max_num_seqs=17, max_num_batched_tokens=2048,
    max_model_len_tokens=4096, step_time=replace(TRUE, token_table=((1, 0.0), (512, 0.001))), measured={"engine": "http://x", "runs": 3},
)  # fmt: skip


def write(path: Path, told: ProfileFile) -> str:
    told.write(path)
    return str(path)


def test_a_calibrated_engine_is_a_profile_like_any_other(tmp_path: Path) -> None:
    path = write(tmp_path / "server.yaml", CALIBRATED)
    p = profile(path)
    assert (p.name, p.model, p.gpu) == (path, MODELS["llama3-8b"], GPUS["h100"])
    assert (p.block_size_tokens, p.kv_block_count, p.max_num_seqs, p.max_num_batched_tokens) == (32, 1234, 17, 2048)
    assert p.max_model_len_tokens == 4096
    assert p.fitted == CALIBRATED.step_time
    shape = {"prefill_tokens": 300, "prefill_context_tokens": 20, "decode_sequences": 3, "decode_context_tokens": 999}
    assert step_s(p, **shape) == CALIBRATED.step_time(**shape) if CALIBRATED.step_time else False
    assert decode_step_s(p, 4, 4000) != decode_step_s(profile("h100-llama3-8b"), 4, 4000)


def test_prior_simulated_engine_and_model_take_it(tmp_path: Path) -> None:
    path = write(tmp_path / "server.yaml", CALIBRATED)
    assert prior_of(ExecutionInstance("a", host="x", port=1, model_name="m", profile=path)).fitted == CALIBRATED.step_time
    engine = SimEngine(path)
    assert engine.context == 4096
    assert (engine.model.blocks.total, engine.model_name) == (1234, "llama3-8b")
    model = EngineModel(profile(path))
    model.add(ModelSequence(100, 2), 0.0)
    run = model.plan(0.0)
    assert run is not None
    assert run.end_s == pytest.approx(prefill_s(profile(path), 100))


def test_a_fleet_may_be_of_measured_engines(tmp_path: Path) -> None:
    fleet = parse_fleet(f"2x{write(tmp_path / 'server.yaml', CALIBRATED)}")
    for instance, of in fleet.instances():
        assert of.fitted == CALIBRATED.step_time
        assert instance.profile
        assert profile(instance.profile) == of


def test_fitted_may_also_be_handed_to_the_model() -> None:
    model = EngineModel(profile("h100-llama3-8b"), step_time=TRUE)
    model.add(ModelSequence(100, 2), 0.0)
    run = model.plan(0.0)
    assert run is not None
    assert run.end_s == TRUE(prefill_tokens=100, prefill_context_tokens=0, decode_sequences=0, decode_context_tokens=0)


def test_a_file_needs_no_base_where_all_that_counts_was_measured(tmp_path: Path) -> None:
    own = replace(MODELS["tiny"], name="mine", layers=7)
    p = profile(write(tmp_path / "own.yaml", ProfileFile("own", model=own, kv_block_count=99, step_time=TRUE)))
    assert (p.model, p.kv_block_count, p.max_model_len_tokens) == (own, 99, 99 * 16)
    both = ProfileFile("both", model=MODELS["llama3-70b"], gpu=GPUS["h100"], tensor_parallel_size=4)
    path = write(tmp_path / "both.yaml", both)
    assert profile(path) == replace(profile("h100x4-llama3-70b"), name=path)


@given(
    st.builds(
        ProfileFile,
        st.text(st.characters(codec="utf-8", exclude_categories=("C",)), min_size=1, max_size=8),
        base=st.sampled_from(["h100-llama3-8b", "a100x4-llama3-70b"]),
        block_size_tokens=st.none() | st.sampled_from([8, 16, 128]),
        kv_block_count=st.none() | st.integers(1, 10**6),
        max_num_seqs=st.none() | st.integers(1, 1024),
        step_time=st.none() | st.builds(FittedStep, st.floats(1e-9, 1), st.floats(0, 1), decode_context_s=st.floats(0, 1e-3)),
    )
)
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, told: ProfileFile) -> None:
    path = write(tmp_path_factory.mktemp("profile") / "p.yaml", told)
    p = profile(path)
    assert p.fitted == told.step_time
    assert p.name == path
    assert load(path).name == told.name
    assert p.kv_block_count_override == told.kv_block_count


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "begins with 'version: 1'"),
        ("{", "not YAML"),
        ("version: 2", "begins with 'version: 1'"),
        ("secret: hunter2", "begins with 'version: 1'"),
        ("version: 1", "neither base nor model"),
        ("version: 1\nbase: h100-llama3-8", "did you mean 'h100-llama3-8b'"),
        ("version: 1\nbase: other.yaml", "not a profile of the catalogue"),
        ("version: 1\nbase: h100-llama3-8b\nmodel: tiny", "not both"),
        ("version: 1\nbase: h100-llama3-8b\nkv_blocks: 3", "did you mean 'kv_block_count'"),
        ("version: 1\nbase: h100-llama3-8b\nkv_block_count: 0", "kv_block_count 0"),
        ("version: 1\nbase: h100-llama3-8b\nmax_num_seqs: true", "max_num_seqs True"),
        ("version: 1\nbase: h100-llama3-8b\nstep_time: {overhead: 1}", "'overhead' is not one of overhead_s"),
        ("version: 1\nbase: h100-llama3-8b\nstep_time: {overhead_s: -1}", "overhead_s -1"),
        ("version: 1\nbase: h100-llama3-8b\nstep_time: 3", "is a mapping"),
        ("version: 1\nmodel: tiny", "both step_time and kv_block_count"),
        ("version: 1\nmodel: tin\nkv_block_count: 3", "did you mean 'tiny'"),
        ("version: 1\nmodel: {name: x}\ngpu: h100", "required field"),
        ("version: 1\nmodel: tiny\ngpu: {name: x, memory_gb: 0, bandwidth_gb_s: 1, tflops_bf16: 1, interconnect_gb_s: 1}", "memory_gb 0"),
        ("version: 1\nmodel: tiny\ngpu: {size: 3}", "'size' is not one of"),
        ("version: 1\nmodel: llama3-70b\ngpu: h100", "does not fit"),
    ],
)
def test_a_file_that_is_no_profile_says_why(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        profile(str(path))
    assert why in str(caught.value)
    assert caught.value.param == "profile"
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="No such file"):
        profile(str(tmp_path / "none.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InvalidRequest, match="not a file"):
        profile(str(tmp_path / "folder.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequest, match="UTF-8"):
        profile(str(tmp_path / "bytes.yaml"))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "server.yaml", CALIBRATED)
    profile(path)
    write(tmp_path / "server.yaml", replace(CALIBRATED, kv_block_count=77_777))
    assert profile(path).kv_block_count == 77_777


def test_the_engines_own_block_count_goes_before_the_reckoned_one() -> None:
    p: EngineProfile = replace(profile("h100-llama3-8b"), kv_block_count_override=100, max_model_len_tokens=0)
    assert (p.kv_block_count, p.max_model_len_tokens) == (100, 1600)
    with pytest.raises(InvalidRequest, match="kv_block_count_override 0"):
        replace(p, kv_block_count_override=0)
