"""Prepared networks against the plain ones: the same on every supported shape, with packed weights and without."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from autoencoder import packed, winograd
from autoencoder.fast import Prepared as PreparedAutoencoder
from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from autoencoder.packed import Kept
from ldm.conditioning import ClassLabels, Cond
from ldm.ema import EMA
from ldm.fast import Apart, Folded, Layers, Prepared
from ldm.paths import VP
from ldm.prediction import make_prediction
from ldm.unet import UNet, UNetConfig
from pipelines import LatentDiffusion
from tests.test_unet import SHAPES, TEXT, difference, inputs, randomise

SIZES = [(8, 8), (10, 14), (9, 13), (3, 5)]


@pytest.fixture(params=["packed", "fewer products", "plain"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With oneDNN's operators, fewer multiplications or not, and as on a machine where they are missing."""
    fewer = request.param == "fewer products"
    monkeypatch.setattr(winograd, "panel", winograd.panel if fewer else lambda: 0)
    monkeypatch.setitem(winograd.DRAWS, torch.float32, winograd.Limits(1, 2**26))
    if request.param == "plain":
        monkeypatch.setattr(packed, "packs", lambda dtype: False)
    elif not packed.packs(torch.float32):
        pytest.skip("oneDNN's fused operators are missing here")
    return request.param


def unet(name: str) -> UNet:
    torch.manual_seed(0)
    return randomise(UNet(UNetConfig(**SHAPES[name]))).requires_grad_(False)  # type: ignore[return-value]


def guided_pair(cond: Cond) -> Cond:
    """The batch told something else, and the batch: as guidance asks."""
    return Cond.cat(Cond(*(None if part is None else part.flip(0) for part in cond)), cond)


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_on_every_shape(name: str, kind: str) -> None:
    plain = unet(name)
    fast = Prepared(plain)
    for size in SIZES:
        x, t, cond = inputs(plain.config, size)
        for times in (t, t[:1].expand(2)):  # a time for each sample, and one for all as when drawing
            assert difference(fast(x, times, cond), plain(x, times, cond)) <= 1e-5
        both, pair, times = guided_pair(cond), torch.cat([x, x]), t[:1].expand(4)
        assert difference(fast(pair, times, both), plain(pair, times, both)) <= 1e-5


def test_masked_tokens_and_many_prompts() -> None:
    """Keys and values are those of the prompt that is given, whatever came before; folded or not."""
    plain = unet("sd15")
    fast = Prepared(plain)
    ways = set()
    x, t, cond = inputs(plain.config)
    masked = cond._replace(mask=torch.tensor([[True] * 4 + [False] * 3, [False] * 7]))
    longer = Cond(tokens=torch.cat([cond.tokens, cond.tokens], dim=1))
    for told in (cond, masked, cond, longer, masked):
        assert difference(fast(x, t, told), plain(x, t, told)) <= 1e-5
        assert fast._last is not None
        ways |= {type(words) for words in fast._last[1].values()}
    assert ways == {Apart, Folded}


def test_twins_are_one_until_the_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first convolution sees half of a guided pair, and all of a batch whose halves differ."""
    plain = unet("sd15")
    fast, seen = Prepared(plain), []
    x, t, cond = inputs(plain.config)
    layers = fast.layers(x.shape)
    first = layers.conv_in
    monkeypatch.setattr(layers, "conv_in", lambda x: seen.append(len(x)) or first(x))
    both, t = guided_pair(cond), t[:1].expand(4)
    fast(torch.cat([x, x]), t, both)
    fast(torch.cat([x, x + 1e-6]), t, both)
    fast(torch.cat([x, x]), torch.tensor([3.0, 3.0, 5.0, 5.0]), both)
    assert seen == [2, 4, 4]


def test_eight_threads_draw_as_one() -> None:
    """With a prepared network each and one between them, which is told eight things in turns."""
    plain = unet("sd21")
    x, t, cond = inputs(plain.config)
    told = [Cond(tokens=cond.tokens + i) for i in range(8)]
    wanted, shared = [plain(x, t, c) for c in told], Prepared(plain)
    worst = [0.0] * 8

    def draw(i: int) -> None:
        own = Prepared(plain)
        for _ in range(10):
            made = max(difference(network(x, t, told[i]), wanted[i]) for network in (own, shared))
            worst[i] = max(worst[i], made)

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) <= 1e-5


def test_reuse_computes_the_coarser_levels_once_in_so_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call is exact; between, the finest level is computed; what does not fit is not reused."""
    plain = unet("sdxl")
    fast, coarse = Prepared(plain, reuse=3), []
    x, t, cond = inputs(plain.config)
    level = fast.layers(x.shape).middle
    middle = level.layers
    monkeypatch.setattr(level, "layers", lambda *args: coarse.append(1) or middle(*args))
    assert difference(fast(x, t, cond), plain(x, t, cond)) <= 1e-5
    assert difference(fast(x, t, cond), plain(x, t, cond)) <= 1e-5  # nothing has changed since
    assert difference(fast(2 * x, t, cond), plain(2 * x, t, cond)) > 1e-3
    assert len(coarse) == 1
    for wide, told in ((torch.cat([x, x], 3), cond), (x, cond._replace(tokens=cond.tokens + 1))):
        assert difference(fast(wide, t, told), plain(wide, t, told)) <= 1e-5
    with pytest.raises(ValueError, match="reuse is 0"):
        Prepared(plain, reuse=0)


@pytest.mark.parametrize(
    "change",
    ["in place", "one, uncounted", "averaged", "loaded", "other parameters", "moved", "inference mode"],
)
def test_layers_are_kept_until_weights_change(change: str) -> None:
    """From one drawing to the next of the same size; then made anew, as for another size or precision."""
    ema, kept = EMA(0.5, unet=unet("scale and shift")), Kept()
    plain = ema["unet"]
    x, t, cond = inputs(plain.config)

    def layers(dtype: torch.dtype = torch.float32, samples: int = 2) -> Layers:
        network = Prepared(plain, dtype, kept=kept)
        made = network(x[:samples], t[:samples], Cond(*(None if p is None else p[:samples] for p in cond)))
        assert difference(made, plain(x, t, cond)[:samples]) <= (1e-5 if dtype == torch.float32 else 0.1)
        return network.layers(x.shape)

    first = layers()
    assert layers() is first
    for other in (layers(samples=1), layers(torch.bfloat16)):
        assert other is not first
    first, state = layers(), {name: p + 0.05 for name, p in plain.state_dict().items()}
    with torch.no_grad(), torch.inference_mode(change == "inference mode"):
        if change in ("loaded", "other parameters"):
            plain.load_state_dict(state, assign=change == "other parameters")
        elif change == "inference mode":
            plain.load_state_dict({name: p + 0.05 for name, p in state.items()}, assign=True)
        elif change == "one, uncounted":
            plain.conv_out.bias.data += 0.01
        elif change == "moved":
            plain.double().float()
        elif change == "averaged":
            (trained := unet("scale and shift")).load_state_dict(state)
            ema.update(1, unet=trained)
        else:
            torch._foreach_mul_([*plain.parameters()], 1.1)
    second = layers()
    assert second is not first
    assert (layers() is second) == (change != "inference mode")  # which does not tell of later changes


def test_bfloat16_is_near() -> None:
    plain = unet("sdxl")
    x, t, cond = inputs(plain.config)
    made = Prepared(plain, torch.bfloat16)(x, t, cond)
    assert made.dtype == torch.float32
    assert 1e-4 < difference(made, plain(x, t, cond)) <= 0.1


def test_wrong_input_is_refused() -> None:
    plain = unet("sd15")
    x, t, cond = inputs(plain.config)
    with pytest.raises(ValueError, match="t has shape"):
        Prepared(plain)(x, t[:1], cond)
    with pytest.raises(ValueError, match="dropout"):
        Prepared(UNet(UNetConfig(**TEXT, dropout=0.1)).train())


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_without_the_operators_it_says_so_once(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Faulty:
        def __getattr__(self, name: str) -> object:
            if fault == "missing":
                raise AttributeError(f"no {name}")
            return getattr(torch.ops.mkldnn, name) if "reorder" in name else Off()

    class Off:
        def __call__(self, x: torch.Tensor, *rest: object) -> torch.Tensor:
            return torch.ones_like(x)

        binary = __call__

    monkeypatch.setattr(packed, "ONEDNN", Faulty())
    packed.packs.cache_clear()
    plain = unet("sd15")
    x, t, cond = inputs(plain.config)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = Prepared(plain)(x, t, cond)
    finally:
        packed.packs.cache_clear()
    assert [str(w.message) for w in caught if "oneDNN" in str(w.message)] == [str(caught[0].message)]
    assert ("no _" if fault == "missing" else "off by") in str(caught[0].message)
    assert difference(made, plain(x, t, cond)) <= 1e-5


def test_weights_elsewhere_are_not_packed_for_the_cpu() -> None:
    """As with `reuse` on a GPU; the meta device stands for it."""
    layers = Layers(unet("sd15").to("meta"), torch.float32)
    held = [
        layers.conv_in,
        layers.conv_out,
        layers.middle.resnets[0].conv1,
    ]
    pixels = layers.middle.attentions[0]
    held += [pixels.proj_in, pixels.blocks[0].first.qkv, pixels.blocks[0].second.to_q, pixels.blocks[0].gate]
    assert not any(layer.packed for layer in held)


def test_trying_the_operators_draws_no_random_numbers() -> None:
    packed.packs.cache_clear()
    before = torch.get_rng_state()
    packed.packs(torch.float32)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("quant", [True, False])
def test_autoencoders(attention: bool, quant: bool, kind: str) -> None:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        block_out_channels=(16, 24, 32),
        norm_num_groups=8,
        mid_block_add_attention=attention,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    plain = randomise(AutoencoderKL(config)).requires_grad_(False)
    fast = PreparedAutoencoder(plain)
    for height, width in ((16, 16), (20, 28), (4, 12)):
        z = torch.randn(2, config.latent_channels, height, width)
        assert difference(fast.decode(z), plain.decode(z)) <= 1e-5
    half = PreparedAutoencoder(plain, torch.bfloat16)
    assert 1e-4 < difference(half.decode(z), plain.decode(z)) <= 0.1
    with pytest.raises(ValueError, match="z has the shape"):
        fast.decode(torch.zeros(1, 3, 4, 4))


def test_models_draw_so() -> None:
    """By default prepared, and the same without; eight threads draw as one; bf16 and reuse only if asked for."""
    torch.manual_seed(0)
    side = {"block_out_channels": (16, 32), "norm_num_groups": 8}
    coder = AutoencoderKL(AutoencoderConfig(**side, mid_block_add_attention=False)).eval()
    path = VP()
    model = LatentDiffusion(
        autoencoder=coder.requires_grad_(False),
        unet=unet("classes"),
        conditioner=ClassLabels(["a", "b", "c", "d"]),
        path=path,
        prediction=make_prediction("v", path),
    )

    def draw(model: LatentDiffusion, name: str, **settings: Any) -> np.ndarray:
        images = model(name, n=2, steps=6, size=(16, 24), **settings)
        return np.stack([np.asarray(image, dtype=int) for image in images])

    wanted = {name: draw(replace(model, fast=False), name) for name in "abcd"}
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda name: draw(model, name), "abcdabcd"))
    for name, pictures in zip("abcdabcd", made, strict=True):
        assert abs(pictures - wanted[name]).max() <= 1
    assert abs(draw(replace(model, precision="bf16"), "a") - wanted["a"]).max() > 1
    assert abs(draw(replace(model, reuse=3), "a") - wanted["a"]).max() > 1
    with pytest.raises(ValueError, match="precision is 'fp8'; choose one of f32, bf16"):
        replace(model, precision="fp8")
    with pytest.raises(ValueError, match="reuse is 0"):
        replace(model, reuse=0)
