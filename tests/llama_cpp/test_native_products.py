"""Laws of the kernels in llama.cpp: its own numbers, whoever shares the call, or llama.cpp's."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf_cases import GREEDY, adapter_of, inputs_of

from offramp.core.decoding.policy import FULL
from offramp_llama_cpp import LlamaCppRuntime, kernels, segment
from offramp_llama_cpp.gguf_export import ExportFormats
from offramp_llama_cpp.native import compiling, products
from offramp_llama_cpp.segment import EngineOptions, Segment, library

pytestmark = pytest.mark.llama_cpp

FORMATS = ("f16", "bf16", "q8_0", "q4_1", "q4_0", "iq4_nl")
OURS = EngineOptions(context=256)
THEIRS = replace(OURS, kernels=False)
STATES = np.random.default_rng(0).normal(size=(45, 32)).astype(np.float32)

needs_kernels = pytest.mark.usefixtures("run_here")
Array = npt.NDArray[np.float32]


@pytest.fixture
def opened(exported: Callable[..., Path]) -> Iterator[Callable[..., Segment]]:
    """`opened(formats, options)`: the tiny LLaVA's layers below its first exit."""
    made: list[Segment] = []

    def load(formats: ExportFormats | str, options: EngineOptions = OURS) -> Segment:
        file = exported("llava", formats) / "segment-0.gguf"
        made.append(Segment(file, options, tap_layer=1))
        return made[-1]

    yield load
    for each in made:
        each.close()


def given(by: Segment, sizes: list[int]) -> Array:
    """Logits and tapped states of the first rows, in calls of these sizes."""
    rows, at = [], 0
    for size in sizes:
        by.feed(STATES[at : at + size], size)
        assert by.tap is not None
        rows.append(np.concatenate([by.logits(size), by.tap.rows()], 1))
        at += size
    by.crop(at)
    return np.concatenate(rows)


def rounded(x: Array) -> Array:
    """To 8 bits, in blocks of 32 with a scale each."""
    blocks = x.reshape(len(x), -1, 32)
    most = np.maximum(np.abs(blocks).max(-1, keepdims=True), np.float32(1e-30))
    return (np.rint(blocks * (127 / most)) * (most / 127)).reshape(x.shape)


HALVES = ("f16", "bf16")


def rounded_to_16(x: Array) -> Array:
    """In blocks of 32, whose magnitudes are at most 65520 steps in all, and a half for each."""
    blocks = x.reshape(len(x), -1, 32)
    sizes = np.abs(blocks)
    step = np.maximum(sizes.max(-1) / np.float32(32767), sizes.sum(-1) / np.float32(65520))
    step = np.maximum(step, np.float32(1e-30))[..., None]
    return (np.rint(blocks * (1 / step)) * step).reshape(x.shape)


def read_as(formats: str, x: Array, weights: Array) -> tuple[Array, Array]:
    """Activations and weights as the kernels multiply them: halves by integers of 16 bits."""
    if formats not in HALVES:
        return rounded(x), weights
    most = np.abs(weights).max(1, keepdims=True)
    return rounded_to_16(x), np.rint(weights * (32767 / most)) * (most / 32767)


@pytest.mark.parametrize("formats", FORMATS)
def test_a_product_is_that_of_its_numbers(
    formats: str, instructions: None, exported: Any, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the file's weights and the activations, as they are read, to float32's last bits; by
    llama.cpp nearly so."""
    import gguf

    tap, states, wanted = segment.Tap, {}, ""

    def elsewhere(library: Any, tensor: str, width: int, rows: int, **options: Any) -> Any:
        width = 64 if wanted == "ffn_gate-0" else width
        return tap(library, tensor and wanted, width, rows, **options)

    monkeypatch.setattr(segment, "Tap", elsewhere)
    for wanted in ("ffn_norm-0", "ffn_gate-0"):
        for options in (OURS, THEIRS):
            each = opened(formats, options)
            each.feed(STATES, 45)
            states[wanted, options.kernels] = each.tap.rows().copy()
    reader = gguf.GGUFReader(exported("llava", formats) / "segment-0.gguf")
    [gate] = [t for t in reader.tensors if t.name == "blk.0.ffn_gate.weight"]
    weight = gguf.quants.dequantize(gate.data, gate.tensor_type)
    for by_ours, nearly in ((True, 2e-6), (False, 1e-2)):
        x = states["ffn_norm-0", by_ours]
        x, weight = read_as(formats, x, weight)
        expected = x @ weight.T
        assert expected.shape == (45, 64)
        away = np.abs(states["ffn_gate-0", by_ours] - expected).max()
        assert away < nearly * np.abs(expected).max()


BLOCKS = ("f16", "bf16", "q8_0", "q4_1", "q4_0", "iq4_nl", "q4_K", "q5_0", "q5_1", "q5_K", "q6_K")
ROUNDED = ("q5_0", "q5_1", "q5_K", "q6_K")
"""Those whose weights the kernels round to 8 bits."""


def drawn(rows: int, columns: int) -> Array:
    return np.random.default_rng(1).normal(size=(rows, columns)).astype(np.float32) * 0.03


def product(formats: str, x: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """What the kernels give [T, rows] for activations [T, columns], outside of llama.cpp, and the
    weights that llama.cpp's file would hold; of none, if they leave them to it."""
    import gguf

    number = gguf.GGMLQuantizationType[formats.upper()]
    weights = drawn(40, x.shape[1]) if weights is None else weights
    rows = len(weights)
    block, size = gguf.GGML_QUANT_SIZES[number]
    data = np.empty((rows, x.shape[1] // block * size), dtype=np.uint8)
    lib = library()._lib
    quantize, pointer, whole = lib.ggml_quantize_chunk, ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    quantize(number, weights.ctypes.data, data.ctypes.data, 0, *weights.shape, None)
    held = gguf.quants.dequantize(data, number)
    out = np.empty((len(x), rows), dtype=np.float32)
    made = products.Products(lib)
    size_t = ctypes.c_size_t
    multiply = made._native.offramp_product
    multiply.restype = ctypes.c_bool
    multiply.argtypes = [
        pointer,
        ctypes.c_int,
        size_t,
        size_t,
        pointer,
        size_t,
        size_t,
        pointer,
        pointer,
    ]
    taken = multiply(
        made.handle,
        number,
        rows,
        x.shape[1],
        data.ctypes.data,
        data.shape[1],
        len(x),
        x.ctypes.data,
        out.ctypes.data,
    )
    made.close()
    return (out if taken else out[:0]), held


@pytest.mark.parametrize("formats", BLOCKS)
def test_every_format_that_is_taken_over_is_multiplied(formats: str, instructions: None) -> None:
    """To float32's last bits; scales of q4_K are rounded to float16, and weights of 5 and 6 bits to
    8, by less than what they were rounded by before."""
    x = np.random.default_rng(0).normal(size=(11, 512)).astype(np.float32)
    found, weights = product(formats, x)
    numbers, weights = read_as(formats, x, weights)
    exact = numbers @ weights.T
    if formats in ROUNDED:
        assert np.abs(found - rounded(x) @ rounded(weights).T).max() < 1e-5 * np.abs(exact).max()
    allowed = 1e-2 if formats in ROUNDED else 1e-3 if formats == "q4_K" else 2e-6
    assert np.abs(found - exact).max() < allowed * np.abs(exact).max()


@pytest.mark.parametrize("formats", HALVES)
@pytest.mark.parametrize("outlier", [1, 100])
def test_halves_are_multiplied_nearer_than_llama_cpp_does(
    formats: str, outlier: float, instructions: None
) -> None:
    """It rounds activations to the weights' own format. outlier: times as large as all others."""
    x = np.random.default_rng(0).normal(size=(40, 512)).astype(np.float32)
    x[:, 77] *= outlier
    found, weights = product(formats, x)
    exact = x.astype(np.float64) @ weights.T.astype(np.float64)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[formats]
    theirs = torch.from_numpy(x).to(dtype).double().numpy() @ weights.T
    away, by_llama_cpp = (np.square(each - exact).mean() ** 0.5 for each in (found, theirs))
    assert 0 < away < 0.6 * by_llama_cpp


@pytest.mark.parametrize("formats", HALVES)
def test_sums_of_16_bits_never_overflow(formats: str, instructions: None) -> None:
    """The largest that there are: all weights alike, and all of a block's activations."""
    x = np.ones((9, 64), dtype=np.float32) * np.geomspace(1e-20, 1e20, 9, dtype=np.float32)[:, None]
    weights = np.ones((40, 64), dtype=np.float32)
    weights[20:] = -1
    found, _ = product(formats, x, weights)
    np.testing.assert_allclose(found, x @ weights.T, rtol=2.5e-4)


@pytest.mark.parametrize("formats", HALVES)
def test_rows_that_16_bits_do_not_hold_are_left_to_llama_cpp(
    formats: str, instructions: None
) -> None:
    """A number beside which all others are small; not where they are powers of two, or none."""
    x = np.random.default_rng(0).normal(size=(3, 8192)).astype(np.float32)
    weights = drawn(40, 8192)
    assert len(product(formats, x, weights)[0]) == 3
    weights[33, 5] = 3
    assert not len(product(formats, x, weights)[0])
    weights[33] = 0
    weights[33, :7] = 2.0 ** np.arange(-6, 1)
    found, held = product(formats, x, weights)
    np.testing.assert_allclose(found[:, 33], x @ held[33], rtol=1e-3)
    weights[33, 5] = np.nan
    assert not len(product(formats, x, weights)[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("formats", FORMATS)
def test_what_is_no_number_stays_none(formats: str, bad: float, instructions: None) -> None:
    x = np.random.default_rng(0).normal(size=(9, 64)).astype(np.float32)
    plain, _ = product(formats, x)
    x[3, 40] = bad
    found, _ = product(formats, x)
    assert np.isnan(found[3]).all()
    others = [0, 1, 2, 4, 5, 6, 7, 8]
    assert np.array_equal(found[others], plain[others])


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("small", [1e-4, 1e-8, 1e-20])
def test_small_blocks_count(formats: str, small: float, instructions: None) -> None:
    x = np.zeros((3, 96), dtype=np.float32)
    x[:, 32:64] = np.random.default_rng(0).normal(size=(3, 32)) * small
    found, weights = product(formats, x)
    numbers, weights = read_as(formats, x, weights)
    expected = numbers @ weights.T
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@needs_kernels
def test_threads_that_end_leave_no_memory_behind() -> None:
    """What leaks does so in every round; other threads, and what the C library keeps of freed
    memory, make a process grow in some."""
    x = np.ones((512, 4096), dtype=np.float32)
    kept = []

    def run() -> None:
        kept.append(product("q8_0", x, drawn(32, 4096))[0].sum())

    def megabytes() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def growth(threads: int) -> float:
        before = megabytes()
        for _ in range(threads):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        return megabytes() - before

    assert min(growth(8) for _ in range(6)) < 8  # a call's activations take 2.3 MB
    assert len(kept) == 48


@needs_kernels
@pytest.mark.parametrize("formats", FORMATS)
def test_logits_are_nearly_those_of_llama_cpps_kernels(formats: str, opened: Any) -> None:
    ours, theirs = opened(formats), opened(formats, THEIRS)
    assert ours.vocabulary % 32, "the last rows of a head are to be no whole group"
    found, expected = (given(each, [45]) for each in (ours, theirs))
    assert ours.products.bytes > 0 and theirs.products is None
    assert not np.array_equal(found, expected), "they were not used"
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("formats", FORMATS)
def test_a_token_comes_out_the_same_whoever_shares_its_call(
    formats: str, instructions: None, opened: Any
) -> None:
    one = opened(formats)
    alone = given(one, [1] * 45)
    for sizes in ([45], [2] * 22 + [1], [3, 4, 5, 6, 7, 9, 11], [8, 16, 17, 4]):
        assert np.array_equal(alone, given(one, sizes))


@needs_kernels
def test_a_product_alone_in_its_graph_reads_the_activations_of_its_own_call(opened: Any) -> None:
    """They stand at the address of those of the call before."""
    one = opened(ExportFormats("f32", "f32", head="q8_0"))
    assert one.products.bytes == 0
    alone, together = (given(one, sizes) for sizes in ([1] * 6, [6]))
    assert one.products.bytes > 0
    np.testing.assert_allclose(alone, together, atol=0.02)


@needs_kernels
@pytest.mark.parametrize("formats", ["f16", "q4_1"])
def test_threads_change_nothing(formats: str, opened: Any) -> None:
    one, three = opened(formats), opened(formats, replace(OURS, threads=3))
    for sizes in ([1] * 4, [9]):
        assert np.array_equal(given(one, sizes), given(three, sizes))


@needs_kernels
def test_more_threads_than_processors_wait_for_each_other_in_turns(opened: Any) -> None:
    """One that waits gives its processor to the one that it waits for: it took half a minute."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("threads cannot be bound to a processor here")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        began = time.process_time()
        given(opened("f16", replace(OURS, threads=4)), [1] * 24)
        assert time.process_time() - began < 2
    finally:
        os.sched_setaffinity(0, before)


@needs_kernels
def test_a_format_that_is_not_known_is_left_to_llama_cpp(opened: Any) -> None:
    ours, theirs = opened("f32"), opened("f32", THEIRS)
    found, expected = given(ours, [1, 8]), given(theirs, [1, 8])
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    else:  # without it, calls of llama.cpp's own kernels come out less alike
        np.testing.assert_allclose(found, expected, atol=0.02)
    assert ours.products.bytes == 0


@needs_kernels
def test_memory_is_given_back(opened: Any) -> None:
    one = opened("q8_0")
    given(one, [4])
    packed = one.products.bytes
    given(one, [4, 1])
    assert one.products.bytes == packed, "a weight is packed once"
    one.close()
    one.close()
    assert one.products.bytes == 0


@pytest.mark.parametrize("formats", ["f16", "q8_0", "q4_1"])
def test_lossless_is_the_full_model_by_llama_cpps_kernels(formats: str, exported: Any) -> None:
    policy = replace(adapter_of("llava").policy, lossless=True, max_draft=3)
    with LlamaCppRuntime(adapter_of("llava"), exported("llava", formats), engine=THEIRS) as runtime:
        inputs = inputs_of("llava")
        ours = runtime.generate(inputs, policy=policy, **GREEDY)
        full = runtime.generate(inputs, policy=FULL, **GREEDY)
    assert torch.equal(ours.sequences, full.sequences) and ours.rounds


def test_without_a_compiler_llama_cpp_multiplies(
    exported: Any, anew: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    segment._warn_of_slower_kernels.cache_clear()
    adapter, folder = adapter_of("llava"), exported("llava", "q8_0")
    found = []
    for compiler in (os.environ.get("CC", "cc"), "no-such-compiler"):
        monkeypatch.setenv("CC", compiler)
        anew()
        with LlamaCppRuntime(adapter, folder, engine=OURS) as runtime:
            used = runtime._segments[0].products is not None
            found.append(runtime.generate(inputs_of("llava"), **GREEDY))
    assert not used and kernels().startswith("its own kernels: ")
    warned = [r for r in caplog.records if r.levelname == "WARNING" and "kernels" in r.message]
    assert len(warned) == 1
    assert all(output.new_tokens.shape[1] > 3 for output in found)


def test_a_library_is_compiled_once_and_again_where_it_cannot_be_kept(
    anew: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if compiling.compiled("tap") is None:
        pytest.skip("there is no C compiler")
    [library] = compiling.cache_folder("native").glob("*.so")
    written = library.stat().st_mtime_ns
    anew()
    assert compiling.compiled("tap") is not None
    assert library.stat().st_mtime_ns == written
    anew()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiling.compiled("tap") is not None
